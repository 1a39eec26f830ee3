"""Temperatures: fixed, by entropy, or chosen for each prompt."""
