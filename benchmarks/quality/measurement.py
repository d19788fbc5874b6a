"""A model in some formats of its experts, of attention and of its head: its sizes, and what it loses on a text.

Formats are written as bits x group size. `quality.py`, `hot_experts.py` and `lm_head.py` choose which are measured.
"""

# B windows

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import TINY_MOE
from benchmarks.quality.held_out import Text, losses
from transformers_moe_offload import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization

PLAIN = "16"
"""Bits of what is not quantized."""

FOUR_BITS = "4x32"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats of the experts by layer, of attention, and of the output embedding."""

    experts: tuple[str, ...]
    attention: str = PLAIN
    lm_head: str = PLAIN
    solver: str = "hqq"

    @property
    def config(self) -> OffloadConfig:
        layers = {str(number): self._format(text) for number, text in enumerate(self.experts)}
        return OffloadConfig(
            cache_budget="100%",
            experts=ExpertFormats(layers=layers),
            dense=self._format(self.attention),
            lm_head=self._format(self.lm_head),
        )

    def _format(self, text: str) -> HqqFormat | None:
        if text == PLAIN:
            return None
        return replace(HqqFormat.parse(text), optimize=self.solver == "hqq")

    def __str__(self) -> str:
        runs = [(text, [i for i, _ in run]) for text, run in groupby(enumerate(self.experts), key=lambda pair: pair[1])]
        if len(runs) == 1:
            return runs[0][0]
        return ", ".join(f"{f'{i[0]}-{i[-1]}' if len(i) > 1 else i[0]}: {text}" for text, i in runs)


class Measurement:
    """A model, a text, and what has been measured of them."""

    def __init__(self, text: Text, folder: Path = TINY_MOE) -> None:
        self.text = text
        self._folder = folder
        self._source = meta_model(str(folder), local_files_only=True)
        self.num_layers = len(self._source.experts)
        self._losses: dict[Recipe, Tensor] = {}

    def uniform(self, experts: str, attention: str = PLAIN, solver: str = "hqq") -> Recipe:
        """All layers alike."""
        return Recipe(experts=(experts,) * self.num_layers, attention=attention, solver=solver)

    def sizes(self, recipe: Recipe) -> dict[str, float]:
        """Bytes and bits per weight as they are stored, scales and zeros included."""
        sizes = Sizes.of(Quantization.of(self._source.model, recipe.config, self._source.dtype))
        return {
            "bits_per_expert_weight": sizes.bits_per_expert_weight,
            "bits_per_weight": 8 * self._source.dtype.itemsize * sizes.nbytes / sizes.plain_bytes,
            "bytes": sizes.nbytes,
        }

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """Sizes and perplexities of a recipe, and how far above those of 16 and of 4 bits they are."""
        formats = f"experts {recipe}, attention {recipe.attention}, head {recipe.lm_head}"
        typer.echo(f"measuring {formats}, {recipe.solver}", err=True)
        found = self._of(recipe)
        return {
            "experts": str(recipe),
            "attention": recipe.attention,
            "lm_head": recipe.lm_head,
            "solver": recipe.solver,
            **self.sizes(recipe),
            "perplexity": {name: part.mean().exp().item() for name, part in self.text.by_domain(found).items()},
            "over_plain": _over(found, self._of(self.uniform(PLAIN))),
            "over_four_bits": _over(found, self._of(self.uniform(FOUR_BITS, recipe.attention))),
        }

    @cached_property
    def _plain_on_trained(self) -> float:
        """Nats per token of training text if nothing is quantized."""
        return self._measured(self.uniform(PLAIN), self.text.trained).mean().item()

    def rises(self, form: str) -> list[float]:
        """Nats per token of training text that each layer costs if only its experts are in this format."""
        typer.echo(f"searching {form}", err=True)
        before = self._plain_on_trained
        return [
            self._measured(recipe, self.text.trained).mean().item() - before
            for recipe in (Recipe(experts=_one(form, layer, self.num_layers)) for layer in range(self.num_layers))
        ]

    def _of(self, recipe: Recipe) -> Tensor:
        if recipe not in self._losses:
            self._losses[recipe] = self._measured(recipe, self.text.held_out)
        return self._losses[recipe]

    def _measured(self, recipe: Recipe, windows: Tensor) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            self._folder, moe_offload=recipe.config, dtype=torch.float32, device_map="cpu"
        )
        found = losses(model.eval(), windows)
        model.moe_offload.close()
        return found


def _one(form: str, layer: int, num_layers: int) -> tuple[str, ...]:
    return tuple(form if number == layer else PLAIN for number in range(num_layers))


def _over(found: Tensor, reference: Tensor) -> dict[str, float]:
    """Ratio of two perplexities and its standard error, as the windows differ. found, reference (B,) nats per token."""
    rise = found - reference
    ratio = rise.mean().exp().item()
    return {"ratio": ratio, "standard_error": ratio * rise.std(correction=0).item() / len(rise) ** 0.5}
