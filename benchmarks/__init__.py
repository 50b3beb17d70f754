"""Benchmarks: speed on this machine, next to other libraries."""
