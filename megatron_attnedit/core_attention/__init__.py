"""Softmax attention of queries, keys and values on every device: windows, sinks, its backends."""
