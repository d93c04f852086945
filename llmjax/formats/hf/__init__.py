"""Hugging Face folders: configs, weights and tokenizers, read and written."""
