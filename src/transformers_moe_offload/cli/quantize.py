"""`moe-offload quantize`: write a checkpoint with quantized experts, without ever building the model."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from rich import box
from rich.console import Console
from rich.table import Table

from transformers_moe_offload.cli import formats, options
from transformers_moe_offload.cli.push import push as push_folder
from transformers_moe_offload.cli.writing import progress, resumable
from transformers_moe_offload.config import ExpertFormats, OffloadConfig
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.model.plan import readable
from transformers_moe_offload.hf.prebuilt.layout import MARKS
from transformers_moe_offload.hf.prebuilt.quantize import QuantizationPlan


def quantize(
    source: str,
    folder: Path,
    experts: str | None,
    layers: list[str] | None,
    hot: str | None,
    trace: Path | None,
    hot_share: str | None,
    dense: str | None,
    lm_head: str | None,
    no_optimize: bool,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    push: str | None,
    private: bool,
    base_model: str | None,
    **commit: Unpack[options.Commit],
) -> None:
    """Show the formats and sizes of the weights, write the checkpoint, and upload it if asked to."""
    asked = formats.parse_formats(experts, layers, hot, trace, hot_share, dense, lm_head, optimize=not no_optimize)
    model = meta_model(source, **commit)
    asked.expect_traced(model)
    plan = QuantizationPlan.of(model, OffloadConfig(experts=asked.experts, dense=asked.dense, lm_head=asked.lm_head))
    console = Console()
    console.print(model.title, style="bold", soft_wrap=True)
    console.print(_table(plan))
    if dry_run:
        return
    prepared = plan.prepare(folder, overwrite=overwrite, repo=push, base_model=base_model)
    with resumable(folder, MARKS), progress("quantizing", prepared.nbytes) as advance:
        prepared.write(workers=workers, advance=advance)
    console.print(f"wrote {folder}", soft_wrap=True)
    if push is not None:
        push_folder(folder, push, private, revision=None, create_pr=False, token=commit["token"])


def _table(plan: QuantizationPlan) -> Table:
    sizes, quantization = plan.sizes, plan.quantization
    table = Table("weights", "format", box=box.SIMPLE_HEAD)
    for column in ("bits per weight", "before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    stored = plan.config.formats or ExpertFormats()
    kinds = [str(value or quantization.left_as) for value in (stored.default, *stored.layers.values())]
    if stored.num_hot:
        kinds.append(f"{stored.num_hot} hot: {stored.hot or quantization.left_as}")
    bits, before, after = sizes.bits_per_expert_weight, sizes.plain_expert_bytes, sizes.expert_bytes
    names = "; ".join(dict.fromkeys(kinds))
    table.add_row(f"{sizes.num_experts} experts", names, f"{bits:.2f}", readable(before), readable(after))
    dense, head = plan.config.dense, plan.config.lm_head
    names = str(dense or quantization.dense_left_as) + (f"; output embedding: {head}" if head is not None else "")
    bits_of_each = "; ".join(f"{format.bits_per_weight:.2f}" for format in (dense, head) if format is not None)
    table.add_row("dense", names, bits_of_each, readable(sizes.plain_dense_bytes), readable(sizes.dense_bytes))
    table.add_row("all", "", "", readable(sizes.plain_bytes), readable(sizes.nbytes))
    return table
