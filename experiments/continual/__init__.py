"""The protocol 'continual': task after task in one network, and how much of each is left.

problem.py    what a method is, and what it is given
methods.py    fine-tuning, separate networks, joint training, EWC, Synaptic Intelligence, replay, A-GEM; METHODS
packing.py    PackNet and EfficientPackNet
programs.py   the compiled programs, each of all networks at once; tasks are arguments
protocol.py   run: what happens when, checkpoints, and the files that a run leaves
measures.py   the matrix of accuracies → averages, transfer, forgetting
results.py    those files read again, and the figures of the report
figures.py    drawn from plain arrays
"""
