"""ChunkLLM: key-value selection by chunks of the context, with trained adapters or without (arXiv 2510.02361)."""

from chunkllm.adapters import AdapterConfig, AdapterScorer, BoundaryDetector, ChunkAdapters
from chunkllm.calibration import CalibrationConfig, ChunkCalibration
from chunkllm.contiguous import Attachment, ChunkCache, ChunkSelection, Reading
from chunkllm.errors import ChunkError
from chunkllm.scorers import PooledScorer, Scorer

__all__ = [
    "AdapterConfig",
    "AdapterScorer",
    "Attachment",
    "BoundaryDetector",
    "CalibrationConfig",
    "ChunkAdapters",
    "ChunkCache",
    "ChunkCalibration",
    "ChunkError",
    "ChunkSelection",
    "PooledScorer",
    "Reading",
    "Scorer",
]
