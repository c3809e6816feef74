"""A grid of learning runs: tasks x seeds x variants, picked up where it was stopped, and summed up."""
