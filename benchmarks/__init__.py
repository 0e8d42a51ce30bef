"""Connectors side by side: CPU time per unit of work, latency and memory. Start with `python -m benchmarks --help`."""
