"""`moe-offload quantize`: write a checkpoint with quantized experts, without ever building the model."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import HfApi
from rich import box
from rich.console import Console
from rich.table import Table

from transformers_moe_offload.cli import formats, options
from transformers_moe_offload.cli.blueprint import draw
from transformers_moe_offload.cli.failures import CommandError, reading
from transformers_moe_offload.cli.push import push_folder
from transformers_moe_offload.cli.writing import expect_apart, progress, resumable
from transformers_moe_offload.config import ExpertFormats, OffloadConfig
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.hf.model.plan import readable
from transformers_moe_offload.hf.prebuilt.card import auto_class_of, model_card
from transformers_moe_offload.hf.prebuilt.layout import MARKS, plain_config, prebuilt_config
from transformers_moe_offload.hf.prebuilt.recipe import recipe_of
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization, contents
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.hub.fetch import fetch
from transformers_moe_offload.hub.upload import expect_pushable
from transformers_moe_offload.output.place import expect_place
from transformers_moe_offload.output.text import as_json


def quantize(
    source: str,
    folder: Path,
    experts: str | None,
    layers: list[str] | None,
    hot: str | None,
    trace: Path | None,
    hot_share: str | None,
    dense: str | None,
    no_optimize: bool,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    push: str | None,
    private: bool,
    base_model: str | None,
    revision: str,
    token: str | None,
    local_files_only: bool,
) -> None:
    """Show the formats and sizes of the weights, write the checkpoint, and upload it if asked to."""
    config = OffloadConfig(
        experts=formats.parse_formats(experts, layers, hot, trace, hot_share, optimize=not no_optimize),
        dense=formats.parse_format("--dense", dense, optimize=not no_optimize),
    )
    if config.dense is None and (config.formats is None or config.formats.leaves_all_as_they_are):
        raise CommandError("nothing to quantize; say how: --experts 4x64, --layers 0-3=4x64 or --dense 4x64")
    origin = options.Origin(revision, token, local_files_only, trust_remote_code=False)
    expect_apart(source, folder)
    blueprint = draw(source, origin, None)
    if blueprint.recipe is not None:
        raise CommandError(f"{source!r} is quantized already; quantize the model that it was made from")
    formats.expect_same_experts(trace, source, [spec.num_experts for spec in blueprint.experts])
    quantization = blueprint.quantization(config)
    if any(layer.layout.has_own_files for layer in quantization.layers):
        raise CommandError(
            f"the experts of {source!r} are adapters in files of their own, which are written in no other format; "
            f"quantize them while loading, with OffloadConfig(experts=...), or make blocks of them with "
            f"`moe-offload bake` and quantize those"
        )
    sizes = Sizes.of(quantization, blueprint.stored_bytes(quantization, origin))
    console = Console()
    console.print(blueprint.title, style="bold", soft_wrap=True)
    console.print(_plan(config, sizes, quantization))
    if dry_run:
        return
    expect_place(folder, MARKS, overwrite=overwrite)
    if push is not None:
        expect_pushable(HfApi(token=token), push)
    with reading(f"cannot read the weights of {source!r}"):
        fetched = fetch(source, blueprint.model.config, origin.for_files())
    recipe = recipe_of(fetched.name, fetched.revision, fetched.weights, dtype_name(blueprint.dtype), config)
    plain = plain_config(blueprint.model, blueprint.dtype)
    content = Prebuilt(
        *contents(quantization, fetched.weights, fetched.folder),
        texts={
            "config.json": as_json(prebuilt_config(plain, config.recipe())),
            "README.md": model_card(
                push or folder.resolve().name,
                fetched,
                config,
                sizes,
                base_model=base_model,
                auto_class=auto_class_of(blueprint.model),
                left_as=quantization.left_as,
                dense_left_as=quantization.dense_left_as,
            ),
        },
        copies=fetched.companions,
    )
    torch.set_num_threads(1)  # the workers already use all cores
    nbytes = sum(shard.nbytes for shard in content.shards())
    with resumable(folder, MARKS), progress("quantizing", nbytes) as advance:
        write_prebuilt(folder, content, recipe, overwrite=overwrite, workers=workers, advance=advance)
    console.print(f"wrote {folder}", soft_wrap=True)
    if push is not None:
        push_folder(folder, push, private=private, revision=None, token=token)


def _plan(config: OffloadConfig, sizes: Sizes, quantization: Quantization) -> Table:
    table = Table("weights", "format", box=box.SIMPLE_HEAD)
    for column in ("bits per weight", "before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    stored = config.formats or ExpertFormats()
    kinds = [str(value or quantization.left_as) for value in (stored.default, *stored.layers.values())]
    if stored.num_hot:
        kinds.append(f"{stored.num_hot} hot: {stored.hot or quantization.left_as}")
    table.add_row(
        f"{sizes.num_experts} experts",
        "; ".join(dict.fromkeys(kinds)),
        f"{sizes.bits_per_expert_weight:.2f}",
        readable(sizes.plain_expert_bytes),
        readable(sizes.expert_bytes),
    )
    bits = f"{config.dense.bits_per_weight:.2f}" if config.dense else ""
    before, after = readable(sizes.plain_dense_bytes), readable(sizes.dense_bytes)
    table.add_row("dense", str(config.dense or quantization.dense_left_as), bits, before, after)
    table.add_row("all", "", "", readable(sizes.plain_bytes), readable(sizes.nbytes))
    return table
