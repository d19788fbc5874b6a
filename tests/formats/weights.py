"""Weights to quantize."""

import torch

KINDS = ("gaussian", "student", "outliers")


def made(kind, rows=64, cols=512, std=0.02, seed=0):
    """A matrix of the size and spread that those of trained models have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    if kind == "student":  # with 5 degrees of freedom
        squares = torch.randn(5, rows, cols, generator=generator).square().sum(0)
        weight = weight / (squares / 5).sqrt()
    elif kind == "outliers":
        weight = torch.where(torch.rand(rows, cols, generator=generator) < 1e-3, 8 * weight, weight)
    return std * weight


def relative_error(restored, weight):
    """Frobenius norm of the difference, as a share of the weight's."""
    return float((restored.double() - weight.double()).norm() / weight.double().norm())
