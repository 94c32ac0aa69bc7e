"""Labelled safety benchmark for language models: run it, compare backends, gate a release."""

__version__ = "0.1.0"
