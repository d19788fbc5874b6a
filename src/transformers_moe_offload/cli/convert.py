"""`moe-offload convert`: a checkpoint in the layout of another project becomes a prebuilt one, without requantizing."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer
from rich.console import Console

from transformers_moe_offload.cli import options, writing
from transformers_moe_offload.cli.blueprint import draw
from transformers_moe_offload.cli.failures import one_line_errors, reading
from transformers_moe_offload.cli.writing import expect_apart, progress
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


class Layout(StrEnum):
    """The layouts that can be read."""

    MIXTRAL_OFFLOADING = "mixtral-offloading"


def convert(
    source: writing.Source,
    folder: writing.Destination,
    layout: Annotated[Layout, typer.Option("--from", help="The layout of SRC.", show_default=False)],
    workers: writing.Workers = None,
    overwrite: writing.Overwrite = False,
    base_model: Annotated[str | None, typer.Option(help="The Hub's id of the model that SRC was made from.")] = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
) -> None:
    """Convert a checkpoint that another project has quantized into one that loads like any other.

    Codes, scales and zeros of experts stay what they are; quantized dense weights are decoded to float16. Can be
    interrupted or killed at any time: run again, it goes on with what is missing.
    """
    with one_line_errors():
        origin = options.Origin(revision, token, local_files_only, trust_remote_code=False)
        expect_apart(source, folder)
        dtype = torch.float16  # what mixtral-offloading computes in, whatever the config says
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
        torch.set_num_threads(1)  # the workers are the parallel ones
        with progress("converting", sum(shard.nbytes for shard in content.shards())) as advance:
            write_prebuilt(folder, content, recipe, overwrite=overwrite, workers=workers, advance=advance)
        console.print(f"wrote {folder}", soft_wrap=True)
