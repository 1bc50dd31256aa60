"""Checkpoints: lineage, run folders, writing and reading, and conversion between formats."""
