"""Student attentions, a folder each, and the attention that computes them."""
