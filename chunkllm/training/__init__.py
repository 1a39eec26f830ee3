"""How adapters come about: a frozen model reads, adapters learn from what it read, layers are calibrated."""
