"""The one exception that this package raises for input it cannot use."""


class ChunkError(ValueError):
    """Unusable models, caches, parameters or files. The message says what to do about it.

    The most common ones, each with what is wrong and what is right, are in docs/errors/chunk-error.md.
    """
