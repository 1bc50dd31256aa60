"""Judgement by tasks: those of lm-evaluation-harness, and those made from held-out text."""
