"""Train, fold and export a safety verdict into a local language model."""
