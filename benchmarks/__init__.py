"""Benchmarks: speed side by side with others, on the machine at hand."""
