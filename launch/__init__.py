"""Starts runs on machines, one file for each kind of machine."""
