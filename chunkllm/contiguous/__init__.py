"""Chunk selection in transformers, over a cache whose rows are contiguous."""

from chunkllm.contiguous.attach import Attachment, ChunkSelection
from chunkllm.contiguous.cache import ChunkCache
from chunkllm.contiguous.reading import Reading

__all__ = ["Attachment", "ChunkCache", "ChunkSelection", "Reading"]
