"""Mixtures of adapters: one dense model whose experts are LoRA adapters, kept unmerged."""
