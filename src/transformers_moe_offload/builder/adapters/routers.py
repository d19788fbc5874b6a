"""The inputs and the rows of every router of a mixture of adapters."""

# E adapters, I inputs of a router, R rank, O outputs of a linear layer

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_moe_offload.builder.adapters.plan import PREFIX, Adapter, AdapterPlan
from transformers_moe_offload.builder.gates import GateReport, program_gates
from transformers_moe_offload.builder.gates.rows import drawn_rows
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.builder.recipe.routers import DRAWN
from transformers_moe_offload.builder.sources.model_class import on_meta
from transformers_moe_offload.builder.texts.tokenizer import tokenizer_for
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.models.adapter_moe.routed_layers import LoraExperts

_ON_EMBEDDINGS = "router.weight"
_LAYER = re.compile(r"(?P<stack>.+?\.)(?P<layer>\d+)(?P<rest>\..+)")


@dataclass(frozen=True)
class RouterSite:
    """Where one router is."""

    name: str
    """Name of its weight in the mixture."""
    path: str
    """The dense model's module with the router's input; on the embeddings, the first layer with adapters."""
    layer: int
    linears: tuple[str, ...]
    """Paths of the linear layers with adapters that have the same input."""
    num_inputs: int


def router_sites(plan: AdapterPlan) -> list[RouterSite]:
    """All routers, in the order of their names."""
    linears = {
        module.path: module.lora_A.shape[-1]
        for module in on_meta(plan.config).modules()
        if isinstance(module, LoraExperts)
    }
    found = []
    for name, spec in plan.routers.items():
        num_inputs = spec.shape[1]
        path = name.removeprefix(PREFIX).removesuffix(".router.weight")
        if name == _ON_EMBEDDINGS:
            path = next(iter(linears))
            found.append(RouterSite(name, path, 0, (), num_inputs))
            continue
        below = {one: size for one, size in linears.items() if one == path or one.startswith(f"{path}.")}
        # The linear layers of a feed-forward block that read its input; the last one reads intermediate activations.
        same = tuple(one for one, size in below.items() if size == num_inputs and not _is_last(one, below))
        in_layer = _LAYER.match(path)  # the head is in no layer; only programmed routers need one
        found.append(RouterSite(name, path, int(in_layer["layer"]) if in_layer else 0, same or (path,), num_inputs))
    return found


def router_rows(plan: AdapterPlan, *, device: str) -> tuple[dict[str, Tensor], GateReport | None]:
    """The rows (E, I) float32 of every router by its name, and the report on those that were programmed.

    Routers in the same place of each decoder layer are programmed together, with one pass of the texts.
    """
    routing, gate = plan.recipe.adapter_moe, plan.recipe.gate
    assert routing is not None
    sites = router_sites(plan)
    if routing.scoring == "arrow":
        return {site.name: arrow_rows(plan.adapters, site.linears, site.num_inputs) for site in sites}, None
    if gate.mode in DRAWN:
        return {site.name: _drawn(plan, gate, number, site) for number, site in enumerate(sites)}, None
    tokenizer = tokenizer_for(plan.recipe, plan.base)
    named = zip(plan.recipe.experts, plan.adapters, strict=True)
    experts = [replace(expert, name=adapter.name) for expert, adapter in named]
    rows, report = {}, None
    for group in _groups(sites):
        own_gate = replace(gate, site="layer_input") if group[0].name == _ON_EMBEDDINGS else gate
        gates = program_gates(
            own_gate,
            experts,
            plan.base,
            tokenizer,
            {site.layer: site.path for site in group},
            scores="sigmoid" if routing.scoring == "sigmoid" else "softmax",
            device=device,
        )
        report = report or gates.report
        for site in group:
            # Logits are divided by the temperature, so rows that were scaled to an entropy are multiplied by it.
            rows[site.name] = gates.rows[site.layer] * (routing.temperature if gate.scale == "auto" else 1.0)
            if rows[site.name].shape[1] != site.num_inputs:
                raise RecipeError(
                    f"gate.mode={gate.mode!r} gives rows of {rows[site.name].shape[1]}, but {site.path} reads "
                    f"{site.num_inputs} values; set gate.mode to ridge or mean, or adapter_moe.router_per to ffn"
                )
    return rows, report


def _drawn(plan: AdapterPlan, gate: Gate, number: int, site: RouterSite) -> Tensor:
    """Rows that are drawn without text, from another seed for every router."""
    config = plan.base.config
    spread = getattr(config, "initializer_range", 0.02)
    return drawn_rows(
        gate.mode, 1, len(plan.adapters), site.num_inputs, seed=gate.seed + number, initializer_range=spread
    )[0]


def _groups(sites: list[RouterSite]) -> list[list[RouterSite]]:
    groups: dict[str, list[RouterSite]] = defaultdict(list)
    for site in sites:
        groups["" if site.name == _ON_EMBEDDINGS else _matched(site.path)["rest"]].append(site)
    return list(groups.values())


def _matched(path: str) -> re.Match[str]:
    matched = _LAYER.match(path)
    if matched is None:
        raise RecipeError(f"{path} is in no decoder layer; its router cannot be programmed, set gate.mode to random")
    return matched


def _is_last(path: str, below: dict[str, int]) -> bool:
    """Whether a linear layer is the output projection of a block of several."""
    return len(below) > 1 and path.endswith(("down_proj", "fc2", "c_proj", "w2"))


def arrow_rows(adapters: Sequence[Adapter], paths: Sequence[str], num_inputs: int) -> Tensor:
    """Rows from the adapters' weights alone (Arrow, arXiv 2405.11157, section 3.2).

    For each adapter the direction of inputs that it changes most, of length 1: (E, I) float32. `paths` are linear
    layers with the same input, taken as one. An adapter that adds to none of them has zeros: it is chosen last.
    """
    return torch.stack([_direction(adapter, paths, num_inputs) for adapter in adapters])


def _direction(adapter: Adapter, paths: Sequence[str], num_inputs: int) -> Tensor:
    reduced = []
    for path in paths:
        found = adapter.folder.read(path)
        if found is not None:
            lora_a, lora_b = (matrix.double() for matrix in found)
            # B A = Q (R A) with orthonormal Q: the same right singular vectors, from a matrix of R rows.
            triangle = torch.linalg.qr(lora_b).R
            reduced.append(adapter.folder.scaling(path) * triangle @ lora_a)
    if not reduced:
        return torch.zeros(num_inputs)
    return torch.linalg.svd(torch.cat(reduced), full_matrices=False).Vh[0].float()
