"""A plan becomes a checkpoint, checked: the order of steps, and what is written beside the weights.

The caller supplies the routers' rows, and opens the place (`folder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers.utils import CONFIG_NAME
from transformers.utils.logging import tqdm

from transformers_moe_offload.builder.checks.logits import check_logits
from transformers_moe_offload.builder.checks.reload import check_reload
from transformers_moe_offload.builder.gates import Gates
from transformers_moe_offload.builder.plan import BuildPlan
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.builder.writing.card import model_card
from transformers_moe_offload.builder.writing.folder import CARD_NAME, INFO_NAME
from transformers_moe_offload.builder.writing.info import CheckReport, MoeBuildInfo
from transformers_moe_offload.builder.writing.weight_files import weight_shards, write_weights
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.output.shards import Advance, Syncing
from transformers_moe_offload.tensor_files.index import read_index
from transformers_moe_offload.tensor_files.writer import write_bytes, write_text


def write_mixture(
    plan: BuildPlan,
    gates: Gates,
    reader: TensorReader,
    companions: Mapping[str, bytes],
    place: Path,
    folder: Path,
    *,
    name: str | None = None,
    advance: Advance | None = None,
) -> MoeBuildInfo:
    """Write a mixture to its place, and check it there.

    Args:
        plan: what to write.
        gates: the routers' rows.
        reader: what tensors are read from.
        companions: contents of small files to copy, by name.
        place: where it is written.
        folder: where it will appear.
        name: the mixture's name on the card; None means the folder's.
        advance: as in `build_moe`.
    """
    recipe = plan.recipe
    shards = weight_shards(plan, recipe.output.max_shard_bytes)
    with Syncing() as syncing:  # the checks read from the page cache meanwhile
        total = sum(shard.nbytes for shard in shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc="Writing shards", disable=advance is not None) as bar:
            write_weights(place, shards, reader, advance or bar.update, syncing)
        for file, content in companions.items():
            write_bytes(place / file, content)
        write_text(place / CONFIG_NAME, plan.config.to_json_string())
        stored = read_index([place / shard.name for shard in shards])
        was_loaded = check_reload(place, stored, plan.nbytes)
        identity, forced = check_logits(reader, stored)
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
            checks=CheckReport(identity, forced, was_loaded, plan.similarity),
            warnings=plan.warnings,
        )
        write_text(place / INFO_NAME, json.dumps(info.as_dict(), indent=2) + "\n")
        title = name or folder.resolve().name
        write_text(place / CARD_NAME, model_card(title, info, recipe.to_dict(), plan.licence, recipe.hub.tags))
    return info
