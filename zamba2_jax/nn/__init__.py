"""Blocks that models are made of: flax.nnx modules used as pytrees, their math from `zamba2_jax.ops`."""
