"""Whole decode steps, captured in CUDA graphs and replayed."""
