"""Hugging Face's model types: each file reads and writes a family's config.json and names its tensors."""
