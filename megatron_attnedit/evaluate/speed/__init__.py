"""How fast both stages and their parts are, beside a plain transformers script in the same run."""
