"""More rows for the table of ``decoding chunk eval``, measured elsewhere. Each module is a command of its own."""
