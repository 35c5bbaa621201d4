"""Measurements against other libraries and against ourselves; how to run them: bench/peers.md."""
