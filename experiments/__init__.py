"""Sweeps, benchmarks and reproductions. Driven by the command line, and by nothing else."""
