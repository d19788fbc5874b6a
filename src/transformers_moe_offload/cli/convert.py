"""`moe-offload convert`: a checkpoint in the layout of another project becomes a prebuilt one, without requantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from rich.console import Console

from transformers_moe_offload.cli.options import Commit
from transformers_moe_offload.cli.writing import progress, resumable
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.hf.interop.mixtral_offloading import MixtralOffloading
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.prebuilt.layout import MARKS
from transformers_moe_offload.hf.prebuilt.quantize import QuantizationPlan
from transformers_moe_offload.output.place import expect_place


def convert(
    source: str,
    folder: Path,
    layout: str,
    workers: int | None,
    overwrite: bool,
    base_model: str | None,
    **commit: Unpack[Commit],
) -> None:
    """Write the checkpoint, its codes as they were."""
    dtype = torch.float16  # the dtype that mixtral-offloading computes in, also if the config names another
    model = meta_model(source, dtype, **commit)
    expect_place(folder, MARKS, overwrite=overwrite, model=source)
    fetched = model.fetch()
    found = MixtralOffloading.open(fetched.weights[0].parent, model.model)
    plan = QuantizationPlan.of(model, OffloadConfig(experts=found.formats()))
    console = Console()
    formats = dict.fromkeys(str(found.formats().of_layer(layer.index)) for layer in plan.quantization.layers)
    console.print(f"experts: {'; '.join(formats)}; codes as they are", soft_wrap=True)
    if found.has_coded_meta():
        console.print("scales and zeros: were in 8 bits, decoded to float16", soft_wrap=True)
    console.print("dense weights: decoded to float16", soft_wrap=True)
    prepared = plan.prepare(
        folder, fetched=fetched, contents_of=found.contents, overwrite=overwrite, base_model=base_model
    )
    with resumable(folder, MARKS), progress("converting", prepared.nbytes) as advance:
        prepared.write(workers=workers, advance=advance)
    console.print(f"wrote {folder}", soft_wrap=True)
