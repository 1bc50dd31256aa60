"""Hugging Face <-> Megatron: names, layouts, files."""
