"""Many devices: the mesh, the one table of what is divided over it, and the ops that each device runs on its part."""
