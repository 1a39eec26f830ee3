"""A page to play on: what the methods make of a text, beside the text without them."""
