"""How `torch.compile` is to be called for steps that are captured once they are compiled."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of `torch.compile` that capture graphs of their own, and the same without: the whole step is captured here."""


def options_of(config: CompileConfig) -> dict[str, Any] | None:
    """The options; None for backend "eager", with which torch computes what it would without."""
    if config.backend == "eager":
        return None
    options = config.to_dict()
    return options | {"mode": _WITHOUT_GRAPHS.get(options["mode"], options["mode"])}
