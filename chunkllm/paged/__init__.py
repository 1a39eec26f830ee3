"""Chunk selection over a paged cache: what an engine that keeps blocks builds on."""
