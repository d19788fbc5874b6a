"""`moe-offload convert`: a checkpoint in the layout of another project becomes a prebuilt one, without requantizing."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.blueprint import draw
from transformers_moe_offload.cli.failures import reading
from transformers_moe_offload.cli.writing import expect_apart, progress, resumable
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.hf.interop.mixtral_offloading import MixtralOffloading
from transformers_moe_offload.hf.prebuilt.card import auto_class_of, model_card
from transformers_moe_offload.hf.prebuilt.layout import MARKS, plain_config, prebuilt_config
from transformers_moe_offload.hf.prebuilt.recipe import recipe_of
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.hub.fetch import fetch
from transformers_moe_offload.output.place import expect_place
from transformers_moe_offload.output.text import as_json


def convert(
    source: str,
    folder: Path,
    layout: str,
    workers: int | None,
    overwrite: bool,
    base_model: str | None,
    revision: str,
    token: str | None,
    local_files_only: bool,
) -> None:
    """Write the checkpoint, its codes as they were."""
    origin = options.Origin(revision, token, local_files_only, trust_remote_code=False)
    expect_apart(source, folder)
    dtype = torch.float16  # the dtype that mixtral-offloading computes in, also if the config names another
    blueprint = draw(source, origin, dtype)
    expect_place(folder, MARKS, overwrite=overwrite)
    with reading(f"cannot read the weights of {source!r}"):
        fetched = fetch(source, blueprint.model.config, origin.for_files())
    found = MixtralOffloading.open(fetched.weights[0].parent, blueprint.model)
    config = OffloadConfig(experts=found.formats())
    quantization = Quantization.of(blueprint.model, config, dtype)
    sizes = Sizes.of(quantization)
    console = Console()
    formats = dict.fromkeys(str(found.formats().of_layer(layer.index)) for layer in quantization.layers)
    console.print(f"experts: {'; '.join(formats)}; codes as they are", soft_wrap=True)
    if found.has_coded_meta():
        console.print("scales and zeros: were in 8 bits, decoded to float16", soft_wrap=True)
    console.print("dense weights: decoded to float16", soft_wrap=True)
    plain = plain_config(blueprint.model, blueprint.dtype)
    content = Prebuilt(
        found.layers(quantization),
        found.dense(quantization),
        texts={
            "config.json": as_json(prebuilt_config(plain, config.recipe())),
            "README.md": model_card(
                folder.resolve().name,
                fetched,
                config,
                sizes,
                base_model=base_model,
                auto_class=auto_class_of(blueprint.model),
            ),
        },
        copies=fetched.companions,
    )
    recipe = recipe_of(fetched.name, fetched.revision, fetched.weights, "float16", config)
    torch.set_num_threads(1)  # the workers already use all cores
    nbytes = sum(shard.nbytes for shard in content.shards())
    with resumable(folder, MARKS), progress("converting", nbytes) as advance:
        write_prebuilt(folder, content, recipe, overwrite=overwrite, workers=workers, advance=advance)
    console.print(f"wrote {folder}", soft_wrap=True)
