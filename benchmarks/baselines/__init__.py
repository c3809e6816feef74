"""Baselines: what other people's methods make of the same task and the same demonstrations."""
