"""When a hook meets what nobody foresaw, the engine goes on as plain vLLM does, and says so: it serves others, too."""

from __future__ import annotations

import logging
from collections import Counter

from decoding.vllm.counts import counts_of_process
from decoding.vllm.metrics import FALLBACKS

logger = logging.getLogger(__name__)

counts: Counter[str] = Counter()
"""How often each part of this process did nothing instead, by its name."""


def fell_back(part: str) -> None:
    """Counts that a part does nothing for a request or a step, and logs the exception that is being handled, once."""
    counts[part] += 1
    counts_of_process().add(FALLBACKS, 1, part)
    if counts[part] == 1:
        logger.exception("%s failed: vLLM goes on without it. From now on this is counted and not logged", part)
