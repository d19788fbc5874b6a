"""Text through a dense model whose decoder layers are in memory one at a time."""
