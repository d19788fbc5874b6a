"""Mixtures of adapters: experts that stay what they are, LoRA adapters, around one dense model."""
