"""The one exception that this package raises for input it cannot use."""


class DecodingError(ValueError):
    """Unusable parameters, files or models. The message says what to do about it."""
