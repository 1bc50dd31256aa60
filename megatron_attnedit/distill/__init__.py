"""The mathematics of both stages."""
