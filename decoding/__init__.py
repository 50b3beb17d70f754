"""Decoding: captions from anything that has a decoder's few methods."""
