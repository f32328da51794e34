"""What is timed: one file for each subject; `python -m benchmarks` prints all of it."""
