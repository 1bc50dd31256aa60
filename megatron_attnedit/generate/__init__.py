"""Completions of prompts by a model: the teacher's own text to train on."""
