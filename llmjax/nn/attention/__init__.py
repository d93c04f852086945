"""Attention, read top to bottom: a file a variant, and what all of them share."""
