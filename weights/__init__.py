"""Weights: read and write tensors and configs, without building a model."""
