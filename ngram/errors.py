"""The one exception that this package raises for input it cannot use."""


class NGramError(ValueError):
    """Unusable tokens, parameters or files. The message says what to do about it."""
