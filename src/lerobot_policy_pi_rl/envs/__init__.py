"""Simulated environments of this package; importing it loads no simulator."""
