"""Chunk-boundary KV selection with trained QK adapters (arXiv 2510.02361). Nothing is here yet."""
