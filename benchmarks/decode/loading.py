"""Load the made model as a row says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.decode.rows import Row
from transformers_moe_offload import OffloadConfig


def load(row: Row, folder: Path, offload_folder: Path) -> Any:
    """The model on the CPU; accelerate's rows write a copy of the experts to `offload_folder`."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if row.kind == "ours":
        assert row.arithmetic in ("fast", "exact")
        options["moe_offload"] = OffloadConfig(
            cache_budget=f"{row.budget_percent}%",
            arithmetic=row.arithmetic,
            mmap=False if row.is_copied else "auto",
        )
    else:
        options["experts_implementation"] = row.implementation
    if row.kind == "accelerate":
        places = _experts_on_disk(folder, row.budget_percent or 0)
        options |= {"device_map": places, "offload_folder": offload_folder}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if row.kind == "accelerate-cpu":
        for name, module in list(model.named_modules()):
            if name.endswith(".experts"):
                cpu_offload(module, execution_device=torch.device("cpu"))
    return model


def _experts_on_disk(folder: Path, kept_percent: int) -> dict[str, str]:
    """A device map with experts modules on disk and the rest in RAM, in as few entries as that takes.

    So many percent of the experts modules stay in RAM, the first ones, which is where accelerate puts them itself.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    experts = experts[len(experts) * kept_percent // 100 :]
    places: dict[str, str] = {}

    def place(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            below = f"{path}{name}"
            if below in experts:
                places[below] = "disk"
            elif any(expert.startswith(f"{below}.") for expert in experts):
                place(child, f"{below}.")
            else:
                places[below] = "cpu"

    place(model, "")
    return places


class FetchCounter:
    """Counts the bytes of the tensors that accelerate's hooks fetch for the modules it keeps on disk."""

    def __init__(self, model: Any) -> None:
        self.nbytes = 0
        self.num_modules = 0
        for module in model.modules():
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                if getattr(part, "weights_map", None) is not None:
                    part.weights_map = _Counting(part.weights_map, self)
                    self.num_modules += 1


class _Counting(Mapping[str, Any]):
    def __init__(self, weights: Mapping[str, Any], counter: FetchCounter) -> None:
        self._weights = weights
        self._counter = counter

    def __getitem__(self, name: str) -> Any:
        tensor = self._weights[name]
        self._counter.nbytes += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
