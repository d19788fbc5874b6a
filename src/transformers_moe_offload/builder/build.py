"""`validate_recipe` and `build_moe`: from a recipe to a checkpoint.

The sources are opened and the gates computed from here; `writing` writes the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_moe_offload.builder.channel_split import channels_of
from transformers_moe_offload.builder.checks.similarity import compared
from transformers_moe_offload.builder.gates import STATISTICS_NAME, Gates, program_gates
from transformers_moe_offload.builder.licences import verdict_of
from transformers_moe_offload.builder.plan import BuildPlan, plan_build
from transformers_moe_offload.builder.plan.compatibility import expect_mergeable
from transformers_moe_offload.builder.plan.mixture import origins_of
from transformers_moe_offload.builder.publish import published_after
from transformers_moe_offload.builder.recipe import Expert, MoeRecipe
from transformers_moe_offload.builder.sources import open_source
from transformers_moe_offload.builder.texts.expert_texts import expect_files
from transformers_moe_offload.builder.texts.tokenizer import tokenizer_files, tokenizer_for
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.builder.writing.folder import build_place
from transformers_moe_offload.builder.writing.info import MoeBuildInfo
from transformers_moe_offload.builder.writing.mixture import write_mixture
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.hub.fetch import is_tokenizer_file, published
from transformers_moe_offload.output.shards import Advance


def validate_recipe(recipe: MoeRecipe, *, token: str | None = None, local_files_only: bool = False) -> BuildPlan:
    """Plan a recipe: container, tensors, bytes, and warnings about what is doubtful.

    Reads configs and headers only, of models on the Hub too. Raises an error of ours for what cannot be built.
    """
    if recipe.kind == "adapter_moe":
        raise RecipeError("kind: adapter_moe is built by build_adapter_moe, which takes the same arguments")

    expect_files(recipe.experts)
    opened = partial(open_source, token=token, local_files_only=local_files_only)
    base = opened(recipe.base_model)
    sources = [base, *(opened(origin, base=base) for origin in origins_of(recipe)[1:])]
    stem = base if recipe.stem.source is None else opened(recipe.stem.source, base=base)
    merged = sources[1:] if recipe.stem.method != "base" else ()
    plan = plan_build(recipe, sources, [stem, *merged])
    expect_mergeable(plan.stems, plan.stem_names)
    verdict = verdict_of(plan.ancestors, recipe)
    return replace(plan, licence=verdict, warnings=(*plan.warnings, *verdict.warnings))


def build_moe(
    recipe: MoeRecipe,
    folder: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    push: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    advance: Advance | None = None,
) -> MoeBuildInfo:
    """Build a mixture of experts.

    The mixture appears in `folder` when it is complete and checked; until then its files are in a folder beside it. A
    build that was killed resumes when it is run again; one that fails a check leaves nothing.

    Args:
        recipe: what to build, from what.
        folder: where; it must not be there yet, or be empty.
        device: where the base model's layers run while gates are computed.
        resume: whether to go on with what an earlier build by this recipe has left.
        overwrite: replace a complete checkpoint that is there.
        push: upload it to this repository of the Hub when it is done, as `recipe.hub` says.
        token: as in `from_pretrained`.
        local_files_only: as in `from_pretrained`.
        advance: called with the number of bytes just written; without it there is a progress bar.
    """
    folder = Path(folder)
    with published_after(folder, recipe.hub, push, overwrite=overwrite, token=token):
        plan = validate_recipe(recipe, token=token, local_files_only=local_files_only)
        companions = _companions(plan, {"token": token, "local_files_only": local_files_only})
        for source, names in plan.read_of:
            source.bring(names)
        plan = compared(plan)
        about = (plan.container.name, plan.ancestors, plan.warnings)
        with build_place(folder, recipe, *about, overwrite=overwrite, resume=resume) as place:
            gates, reader = _calibrated(plan, device, place)
            name = push or recipe.hub.repo_id
            return write_mixture(plan, gates, reader, companions, place, folder, name=name, advance=advance)


def _calibrated(plan: BuildPlan, device: str, place: Path) -> tuple[Gates, TensorReader]:
    """The gates, with a file of their statistics where possible, and what tensors are read from."""
    recipe, num_experts = plan.recipe, plan.shape.num_experts
    names = plan.mixture.names
    experts = [replace(one, name=name) for one, name in zip(recipe.experts, names, strict=False)] or [
        Expert(name=name) for name in names
    ]
    tokenizer = tokenizer_for(recipe, plan.base)
    gated = [expert for expert in recipe.shared_experts if expert.gated]
    has_statistics = recipe.gate.mode == "ridge" and recipe.gate.scoring == "ours" and not gated
    gates = program_gates(
        recipe.gate,
        [*experts, *gated],
        plan.base,
        tokenizer,
        plan.ffn,
        scores=plan.container.scores,
        statistics=place / STATISTICS_NAME if has_statistics else None,
        device=device,
    )
    rows = {layer: rows[:num_experts] for layer, rows in gates.rows.items()}
    shared_rows: dict[int, Tensor] = {layer: rows[num_experts:] for layer, rows in gates.rows.items()} if gated else {}
    split = recipe.split
    channels = None if split is None else channels_of(split, plan.base, tokenizer, plan.ffn, device=device)
    return gates, TensorReader(plan, rows, shared_rows, channels)


def _companions(plan: BuildPlan, options: Mapping[str, Any]) -> dict[str, bytes]:
    """Small files that go along: the tokenizer, its chat template, generation settings, licences."""
    files = {file.name: file for file in plan.base.companions}
    if plan.recipe.tokenizer is not None:
        theirs = tokenizer_files(plan.recipe.tokenizer, options)
        files = {name: file for name, file in files.items() if not is_tokenizer_file(name)}
        files |= {file.name: file for file in theirs}
    return {name: published(file) for name, file in files.items()}
