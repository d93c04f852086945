"""Caches of decoding."""
