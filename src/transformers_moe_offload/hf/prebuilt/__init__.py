"""Prebuilt checkpoints, whose experts are quantized beforehand: their layout on disk, and how they are written."""
