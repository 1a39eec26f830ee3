"""Chunk selection: adapters trained, methods compared, speed behind long contexts."""
