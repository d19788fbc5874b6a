"""Checkpoints whose experts were quantized beforehand: their layout on disk, and how they are written."""
