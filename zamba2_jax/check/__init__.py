"""Whether the devices that are here compute the right numbers, and how fast: kernels, a training step, generation."""
