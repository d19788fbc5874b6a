"""Gradients through experts whose weights are loaded again for the backward pass."""
