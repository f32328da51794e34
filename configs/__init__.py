"""Experiments as values: one file an experiment, its docstring the command, the device, the time and what to expect."""
