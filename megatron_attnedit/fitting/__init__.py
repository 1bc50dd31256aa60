"""Mathematics of fits to what a teacher computes: tensors in, tensors out, of no one attention."""
