"""Weights: tensors and configs read and written, without knowing a model."""
