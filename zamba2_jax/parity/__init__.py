"""Numerical parity with PyTorch."""
