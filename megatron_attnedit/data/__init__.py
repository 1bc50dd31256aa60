"""From text to the samples of a training run: documents, token files, datasets."""
