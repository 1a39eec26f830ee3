"""The one exception that this package raises for input it cannot use."""


class DecodingError(ValueError):
    """Unusable parameters, files or models. The message says what to do about it.

    The most common ones, each with what is wrong and what is right, are in docs/errors/decoding-error.md.
    """
