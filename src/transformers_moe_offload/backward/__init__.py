"""Gradients through experts that are fetched again for the backward pass, and additions to experts."""
