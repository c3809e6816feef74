"""The runner: time, processes, bytes, checkpoints and logs around the algorithm."""
