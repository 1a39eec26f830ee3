"""The one exception that this package raises for input it cannot use."""


class NGramError(ValueError):
    """Unusable tokens, parameters or files. The message says what to do about it.

    The most common ones, each with what is wrong and what is right, are in docs/errors/ngram-error.md.
    """
