"""`validate_recipe` and `build_moe`: from a recipe to a checkpoint in its place, checked.

Every step is a neighbour's; here is their order, and what goes into the folder beside weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME
from transformers.utils.logging import tqdm

from transformers_moe_offload.build.blocks import Channels
from transformers_moe_offload.build.checks import CheckFailedError
from transformers_moe_offload.build.checks.logits import check_logits
from transformers_moe_offload.build.checks.reload import check_reload
from transformers_moe_offload.build.checks.similarity import similarities, strangers
from transformers_moe_offload.build.fitting import expect_mergeable
from transformers_moe_offload.build.gates import Gates, program_gates
from transformers_moe_offload.build.info import INFO_NAME, CheckReport, MoeBuildInfo
from transformers_moe_offload.build.materials import Materials
from transformers_moe_offload.build.mixture import origins_of
from transformers_moe_offload.build.plan import BuildPlan, plan_build
from transformers_moe_offload.build.recipe import Expert, MoeRecipe
from transformers_moe_offload.build.sources import Source, open_source
from transformers_moe_offload.build.sources.tokenizer import is_tokenizer_file, tokenizer_files
from transformers_moe_offload.build.write import weight_shards, write_weights
from transformers_moe_offload.memory.fingerprint import fingerprint
from transformers_moe_offload.memory.record import dtype_name
from transformers_moe_offload.memory.safetensors_index import read_index
from transformers_moe_offload.memory.safetensors_writer import write_bytes, write_text
from transformers_moe_offload.output.place import Marks, expect_place, place_for

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Told of the bytes that are done, as they are."""

RECIPE_NAME = "moe_offload_build.json"
"""What a mixture's recipe is called beside its weights: with the sources' commits, or how their files can be told."""

MARKS = Marks(first=RECIPE_NAME, last=CONFIG_NAME, prefix="moe_offload", is_in_place=False)


def validate_recipe(recipe: MoeRecipe, *, token: str | None = None, local_files_only: bool = False) -> BuildPlan:
    """What a recipe comes to: container, tensors, bytes, and what is doubtful about it.

    Reads configs and headers only. Raises an error of ours for what cannot be built.
    """

    def opened(origin: Any, base: Source | None) -> Source:
        return open_source(origin, base=base, token=token, local_files_only=local_files_only)

    base = opened(recipe.base_model, None)
    sources = [base, *(opened(origin, base) for origin in origins_of(recipe)[1:])]
    stem = base if recipe.stem.source is None else opened(recipe.stem.source, base)
    merged = sources[1:] if recipe.stem.method != "base" else ()
    plan = plan_build(recipe, sources, [stem, *merged])
    expect_mergeable(plan.stems, plan.stem_names)
    return plan


def build_moe(
    recipe: MoeRecipe,
    folder: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    token: str | None = None,
    local_files_only: bool = False,
    advance: Advance | None = None,
) -> MoeBuildInfo:
    """Build a mixture of experts.

    It appears in `folder` when it is complete and checked; until then it is beside it. A build that was killed goes on
    where it was when it is run again; one that fails a check leaves nothing.

    Args:
        recipe: what to build, from what.
        folder: where; it must not be there yet, or be empty.
        device: where the base model's layers run while gates are computed.
        resume: whether to go on with what an earlier build by this recipe has left.
        overwrite: replace a complete checkpoint that is there.
        token, local_files_only: as in `from_pretrained`.
        advance: told of the bytes that are written; without it there is a progress bar.
    """
    folder = Path(folder)
    expect_place(folder, MARKS, overwrite=overwrite)
    plan = validate_recipe(recipe, token=token, local_files_only=local_files_only)
    found = similarities(plan)
    warnings = (*plan.warnings, *strangers(found, recipe.checks.similarity, plan.base.name))
    for warning in warnings:
        logger.warning(warning)
    gates, materials = _materials(plan, device)
    companions = _companions(plan, token=token, local_files_only=local_files_only)
    shards = weight_shards(plan, recipe.output.max_shard_bytes)
    with place_for(
        folder, _identity(plan), MARKS, overwrite=overwrite, resume=resume, discards=(CheckFailedError,)
    ) as place:
        total = sum(shard.nbytes for shard in shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc="Writing shards", disable=advance is not None) as bar:
            write_weights(place, shards, materials, advance or bar.update)
        for name, content in companions.items():
            write_bytes(place / name, content)
        write_text(place / CONFIG_NAME, plan.config.to_json_string())
        stored = read_index([place / shard.name for shard in shards])
        was_loaded = check_reload(place, stored, plan.nbytes)
        identity, forced = check_logits(materials, stored)
        info = MoeBuildInfo(
            folder=folder,
            container=plan.container.name,
            experts=plan.mixture.names,
            experts_per_token=recipe.experts_per_token,
            layers=plan.shape.layers,
            dtype=dtype_name(plan.dtype),
            nbytes=plan.nbytes,
            parameters=plan.parameters,
            sources=plan.ancestors,
            gates=gates.report,
            checks=CheckReport(identity, forced, was_loaded, found),
            warnings=warnings,
        )
        write_text(place / INFO_NAME, json.dumps(info.as_dict(), indent=2) + "\n")
    return info


def _materials(plan: BuildPlan, device: str) -> tuple[Gates, Materials]:
    """The routers' rows, and everything else that is not simply read."""
    recipe, num_experts = plan.recipe, plan.shape.num_experts
    experts: list[Expert] = list(recipe.experts) or [Expert(name=name) for name in plan.mixture.names]
    gated = [expert for expert in recipe.shared_experts if expert.gated]
    gates = program_gates(
        recipe.gate,
        [*experts, *gated],
        plan.base,
        tokenizer_of(plan.base),
        plan.ffn,
        scores=plan.container.scores,
        device=device,
    )
    rows = {layer: rows[:num_experts] for layer, rows in gates.rows.items()}
    shared_rows: dict[int, Tensor] = {layer: rows[num_experts:] for layer, rows in gates.rows.items()} if gated else {}
    return gates, Materials(plan, rows, shared_rows, _channels(plan, device))


def _channels(plan: BuildPlan, device: str) -> Channels | None:
    """Which channels go together where one block is split."""
    if plan.recipe.split is None:
        return None
    from transformers_moe_offload.build.channels import channels_of

    return channels_of(plan.recipe.split, plan.base, tokenizer_of(plan.base), plan.ffn, device=device)


def tokenizer_of(base: Source) -> Any:
    """The base model's; None where it has none."""
    folders = {file.parent for file in base.companions if file.name.startswith("tokenizer")}
    if not folders:
        return None
    return AutoTokenizer.from_pretrained(folders.pop(), local_files_only=True)


def _companions(plan: BuildPlan, *, token: str | None, local_files_only: bool) -> dict[str, bytes]:
    """Small files that go along, byte for byte: the tokenizer, its chat template, generation settings, licences."""
    files = {file.name: file for file in plan.base.companions}
    if plan.recipe.tokenizer is not None:
        theirs = tokenizer_files(plan.recipe.tokenizer, token=token, local_files_only=local_files_only)
        files = {name: file for name, file in files.items() if not is_tokenizer_file(name)}
        files |= {file.name: file for file in theirs}
    return {name: file.read_bytes() for name, file in files.items()}


def _identity(plan: BuildPlan) -> dict[str, Any]:
    """What a build can only go on by if it is the same; says nothing about where sources are on this machine."""
    sources = [
        {
            "name": one.name,
            "revision": one.revision,
            "files": {file.name: fingerprint(file) for file in one.files},
        }
        for one in plan.ancestors
    ]
    return {"recipe": plan.recipe.to_dict(), "container": plan.container.name, "sources": sources}
