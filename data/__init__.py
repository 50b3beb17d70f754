"""Data: any layout of pictures and captions becomes one table; picture files become tensors; captions become tokens."""
