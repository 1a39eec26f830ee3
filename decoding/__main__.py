"""``python -m decoding``."""

from decoding.cli import main

main()
