"""What training and inference take on devices that are not there: memory, time and what bounds it."""
