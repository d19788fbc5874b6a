"""Plan a mixture of adapters from its recipe: the config, the tensors, and the adapters' folders. Reads configs and
headers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_moe_offload.builder.licences import Verdict, verdict_of
from transformers_moe_offload.builder.recipe import Expert, MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor, Source, open_source
from transformers_moe_offload.builder.sources.model_class import on_meta, saved_tensors
from transformers_moe_offload.builder.texts.expert_texts import expect_files
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.models.adapter_moe import AdapterMoeConfig
from transformers_moe_offload.models.adapter_moe.adapter_folders import AdapterFolder
from transformers_moe_offload.untrusted import one_line, quoted

PREFIX = "language_model."
"""Prefix of the dense model's names in the mixture."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of the recipe."""

    name: str
    folder: AdapterFolder
    ancestor: Ancestor
    dense: Source
    """The base model with the adapter merged into it: what the mixture computes with this adapter alone."""
    paths: Mapping[str, int]
    """The linear layers that it adds to -> its rank there."""
    own_weights: tuple[str, ...]
    """Whole tensors in the adapter's file that the base model lacks or has with other values."""


@dataclass(frozen=True)
class AdapterPlan:
    """A mixture of adapters to be built."""

    recipe: MoeRecipe
    base: Source
    adapters: tuple[Adapter, ...]
    config: AdapterMoeConfig
    tensors: tuple[FieldSpec, ...]
    """Tensors of the dense model and of the routers, with their names in the mixture."""
    ancestors: tuple[Ancestor, ...]
    """Every checkpoint that it is made of: the base model's, and the adapters."""
    licence: Verdict

    @cached_property
    def dense(self) -> dict[str, FieldSpec]:
        """Tensors that come from the base model, by its names."""
        return {name: one for one in self.tensors if (name := one.name.removeprefix(PREFIX)) in self.base.tensors}

    @cached_property
    def routers(self) -> dict[str, FieldSpec]:
        """The routers' weights, by their names."""
        return {one.name: one for one in self.tensors if one.name.endswith("router.weight")}

    @property
    def nbytes(self) -> int:
        """Bytes of everything, the adapters included."""
        in_adapters = sum(adapter.folder.weights.stat().st_size for adapter in self.adapters)
        return sum(one.nbytes for one in self.tensors) + in_adapters


def plan_adapters(recipe: MoeRecipe, *, token: str | None = None, local_files_only: bool = False) -> AdapterPlan:
    """Find the adapters and plan the mixture; raises an error of ours for what cannot be built."""
    expect_files(recipe.experts)
    options: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    base = open_source(recipe.base_model, **options)
    names = _names(recipe.experts)
    adapters = tuple(_opened(name, expert, base, options) for name, expert in zip(names, recipe.experts, strict=True))
    config = _config(recipe, base, adapters)
    dtype = torch_dtype(recipe.dtype or _stored_dtype(base))
    try:
        layout = saved_tensors(config, dtype)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    config.dtype = config.get_text_config().dtype = dtype
    tensors = tuple(one for name, one in layout.items() if ".experts." not in name)
    ancestors = (*base.ancestors, *(adapter.ancestor for adapter in adapters))
    plan = AdapterPlan(recipe, base, adapters, config, tensors, ancestors, verdict_of(ancestors, recipe))
    _expect_all_used(plan)
    return plan


def _names(experts: Sequence[Expert]) -> list[str]:
    """The adapters' names: from the recipe, else from their folders."""
    names = []
    for number, expert in enumerate(experts):
        _expect_plain(number, expert)
        assert expert.source is not None
        adapter = str(expert.source.adapter)
        names.append(expert.name or Path(adapter.partition("@")[0]).name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"two adapters are called {quoted(twice[0])}; give each expert a name of its own")
    return names


def _expect_plain(number: int, expert: Expert) -> None:
    """Refuse sources that are more than an adapter, and options that change weights: adapters are copied unchanged."""
    if expert.source is None or expert.source.adapter is None or expert.source.model is not None:
        raise RecipeError(
            f"experts.{number}: kind: adapter_moe mixes adapters of the base model; set source to "
            f"{{adapter: folder or id}} and nothing else"
        )
    for name, default in (("noise_scale", 0.0), ("residual_scale", 1.0), ("delta_scale", 1.0)):
        if getattr(expert, name) != default:
            raise RecipeError(
                f"experts.{number}: {name}={getattr(expert, name)} changes weights, and adapters stay as they are; "
                f"leave it out, or build kind: moe"
            )


def _opened(name: str, expert: Expert, base: Source, options: dict[str, Any]) -> Adapter:
    assert expert.source is not None
    dense = open_source(expert.source, base=base, **options)
    ancestor = dense.ancestors[-1]
    try:
        opened = AdapterFolder.open(ancestor.files[0].parent)
        return Adapter(name, opened, ancestor, dense, opened.paths(), _own_weights(opened, base))
    except ValueError as error:
        raise RecipeError(one_line(error, 600)) from error


def _own_weights(folder: AdapterFolder, base: Source) -> tuple[str, ...]:
    """Whole weights in the adapter's file that are not the base model's."""
    return tuple(
        name
        for name, given in folder.copies().items()
        if name not in base.tensors
        or base.tensors[name].shape != tuple(given.shape)
        or not torch.equal(given.float(), base.read(name).float())
    )


def _config(recipe: MoeRecipe, base: Source, adapters: Sequence[Adapter]) -> AdapterMoeConfig:
    routing = recipe.adapter_moe
    assert routing is not None
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for path, rank in adapter.paths.items():
            ranks[path] = max(rank, ranks.get(path, 0))
    try:
        return AdapterMoeConfig(
            # Without `_name_or_path`: for a config inside of another, that folder would be written, too.
            text_config={key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"},
            adapters=[adapter.name for adapter in adapters],
            target_modules=sorted({path.rpartition(".")[2] for path in ranks}),
            rank=max(ranks.values(), default=1),
            router_per=routing.router_per,
            scoring=routing.scoring,
            temperature=routing.temperature,
            num_experts_per_tok=recipe.experts_per_token,
            architectures=["AdapterMoeForCausalLM"],
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _stored_dtype(base: Source) -> str:
    """The dtype of most of the base model's tensors."""
    dtypes = [one.dtype for one in base.tensors.values()]
    return max(set(dtypes), key=dtypes.count)


def _expect_all_used(plan: AdapterPlan) -> None:
    """Every tensor of the base model, and every layer that an adapter adds to, has a place in the mixture."""
    unused = sorted(plan.base.tensors.keys() - plan.dense.keys())
    if unused:
        raise RecipeError(f"the mixture has no place for {unused[0]} of {plan.base.name}")
    missing = [one.name for one in plan.tensors if one.name not in plan.routers]
    missing = [name for name in missing if name.removeprefix(PREFIX) not in plan.base.tensors]
    if missing:
        raise CheckpointError(f"{plan.base.name} has no tensor {missing[0].removeprefix(PREFIX)}; is it complete?")
    linears = {path for path, module in on_meta(plan.base.config).named_modules() if isinstance(module, nn.Linear)}
    for adapter in plan.adapters:
        if adapter.own_weights:
            raise RecipeError(
                f"{adapter.name} has a {adapter.own_weights[0]} of its own (modules_to_save, or a vocabulary that "
                "grew), and a mixture has one for all adapters; train the adapter without it, or build kind: moe"
            )
        for path in adapter.paths:
            if path not in linears:
                raise RecipeError(
                    f"{adapter.name} adds to {one_line(path)}, which is no linear layer of {plan.base.name}; it "
                    "belongs to another model"
                )
