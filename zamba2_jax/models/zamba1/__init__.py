"""Zamba1 (arXiv:2405.16712): its architecture, config.json, weights and model."""
