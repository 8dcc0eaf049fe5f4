"""Mamba2 (arXiv:2405.21060) as a language model of its own: its architecture, config.json, weights and model."""
