"""Checkpoints in the layouts of other projects, as what a prebuilt one is written from."""
