"""Options for `torch.compile` of steps that are captured in CUDA graphs after they are compiled."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of `torch.compile` that capture CUDA graphs -> the same without: the whole step is captured here."""


def options_of(config: CompileConfig) -> dict[str, Any] | None:
    """Keyword arguments for `torch.compile`; None for backend "eager", which compiles nothing."""
    if config.backend == "eager":
        return None
    options = config.to_dict()
    return options | {"mode": _WITHOUT_GRAPHS.get(options["mode"], options["mode"])}
