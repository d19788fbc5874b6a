"""Tensors inside safetensors files: where each one is, and how files of them are written."""
