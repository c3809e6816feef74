"""Memory and speed of pi0 on one GPU: `python -m benchmarks.gpu`."""
