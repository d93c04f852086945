"""Whole models out of `nn` layers, and their conversion to and from other formats."""
