"""Decoding: search for captions with any decoder that has the methods of cache.Decoder."""
