"""A plan becomes a checkpoint in its place, checked: the order of steps, and what goes into the folder beside weights.

The caller supplies the routers' rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers.utils import CONFIG_NAME
from transformers.utils.logging import tqdm

from transformers_moe_offload.builder.checks import CheckFailedError
from transformers_moe_offload.builder.checks.logits import check_logits
from transformers_moe_offload.builder.checks.reload import check_reload
from transformers_moe_offload.builder.checks.similarity import similarities, strangers
from transformers_moe_offload.builder.gates import Gates
from transformers_moe_offload.builder.plan.plan import BuildPlan
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.builder.writing.card import model_card
from transformers_moe_offload.builder.writing.folder import MARKS
from transformers_moe_offload.builder.writing.info import INFO_NAME, CheckReport, MoeBuildInfo
from transformers_moe_offload.builder.writing.resume_key import resume_key
from transformers_moe_offload.builder.writing.weight_files import weight_shards, write_weights
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.output.place import place_for
from transformers_moe_offload.output.syncing import Syncing
from transformers_moe_offload.tensor_files.index import read_index
from transformers_moe_offload.tensor_files.writer import write_bytes, write_text

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"

Advance = Callable[[int], None]
"""Called with the number of bytes that were written since the last call."""


def write_mixture(
    plan: BuildPlan,
    folder: Path,
    companions: Mapping[str, bytes],
    reader: Callable[[Path], tuple[Gates, TensorReader]],
    *,
    name: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> MoeBuildInfo:
    """Write a mixture to a place beside its folder, check it there, and put it in the folder.

    Args:
        plan: what to write.
        folder: where it appears.
        companions: contents of small files to copy, by name.
        reader: a function of the place that returns the gates, and the reader that tensors are read from.
        name: the mixture's name on the card; None means the folder's.
        resume, overwrite, advance: as in `build_moe`.
    """
    recipe = plan.recipe
    found = similarities(plan)
    warnings = (*plan.warnings, *strangers(found, recipe.checks.similarity, plan.base.name))
    for warning in warnings:
        logger.warning(warning)
    shards = weight_shards(plan, recipe.output.max_shard_bytes)
    with (
        place_for(
            folder,
            resume_key(plan.recipe, plan.container.name, plan.ancestors),
            MARKS,
            overwrite=overwrite,
            resume=resume,
            discards=(CheckFailedError, RecipeError),
        ) as place,
        Syncing() as syncing,  # the checks read from the page cache meanwhile
    ):
        gates, ready = reader(place)
        total = sum(shard.nbytes for shard in shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc="Writing shards", disable=advance is not None) as bar:
            write_weights(place, shards, ready, advance or bar.update, syncing)
        for file, content in companions.items():
            write_bytes(place / file, content)
        write_text(place / CONFIG_NAME, plan.config.to_json_string())
        stored = read_index([place / shard.name for shard in shards])
        was_loaded = check_reload(place, stored, plan.nbytes)
        identity, forced = check_logits(ready, stored)
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
        title = name or folder.resolve().name
        write_text(place / CARD_NAME, model_card(title, info, recipe.to_dict(), plan.licence, recipe.hub.tags))
    return info
