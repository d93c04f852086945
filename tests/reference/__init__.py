"""Oracles: what the papers say in plain numpy, as slowly as it likes; nothing imports llmjax.

They compute in float64, so that what a test measures is the library's own fp32 rounding.
"""
