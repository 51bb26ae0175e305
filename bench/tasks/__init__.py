"""The table of tasks: what each recipe leaves of each task's metrics."""
