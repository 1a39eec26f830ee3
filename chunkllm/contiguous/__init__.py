"""Chunk selection in transformers, over a cache whose rows are contiguous."""
