"""What a training step takes on devices that are not there: memory, time and what bounds it."""
