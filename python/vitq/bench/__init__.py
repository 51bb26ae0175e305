"""Latency, memory and size of models, always as ratios against the float model within one run."""
