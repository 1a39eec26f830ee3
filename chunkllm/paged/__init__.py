"""Chunk selection over a paged cache: what an engine that keeps blocks builds on."""

from chunkllm.paged.blocks import BlockSummaries
from chunkllm.paged.selection import PagedSelection, Reading, Step, local_blocks

__all__ = ["BlockSummaries", "PagedSelection", "Reading", "Step", "local_blocks"]
