"""Accuracy of every method on every model: `python -m bench.accuracy --help`."""
