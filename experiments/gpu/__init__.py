"""``decoding bench gpu``: everything that is to be known of a GPU, in minutes, by one command."""
