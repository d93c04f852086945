"""What comes from other systems and goes to them: Hugging Face folders, GGUF files."""
