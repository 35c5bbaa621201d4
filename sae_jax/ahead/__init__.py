"""A step compiled for devices one does not have, and what its program says."""
