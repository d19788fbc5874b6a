"""Gradients through experts that are brought in again for the backward pass, and what is added to experts."""
