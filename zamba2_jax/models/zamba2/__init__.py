"""Zamba2 (arXiv:2411.15242): its architecture, config.json, weights and model."""
