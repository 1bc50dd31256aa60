"""Recipe, data, loop, checkpoints."""
