"""Names that the command line knows before anything heavy is imported."""

from __future__ import annotations

DEFAULT_MODEL = "smollm2-135m-instruct"
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What models can be loaded in: "auto" is the checkpoint's own where the device computes in it."""
