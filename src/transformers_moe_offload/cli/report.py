"""`moe-offload report`: draw a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformers_moe_offload.cli.failures import one_line_errors, reading
from transformers_moe_offload.cli.replay import Policies, TraceFile, parse_sizes, play
from transformers_moe_offload.tracing import Trace, TraceError
from transformers_moe_offload.tracing.report import (
    draw_expert_use,
    draw_hit_rates,
    draw_stalls,
    make_figure,
    save,
)


def report(
    trace: TraceFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plots; made if it is not there.", show_default=False)
    ],
    policy: Policies = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the cache: numbers of slots, or shares of all experts. Default: ten sizes from 5% to 100%.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw hit rates by residency, the use of experts by layer, and stalls over time. Needs the extra `plots`."""
    with one_line_errors():
        make_figure()  # before the replays, which take a while
        recorded = Trace.load(trace)
        if not recorded.num_asked:
            raise TraceError(f"{trace} holds no visit that wants an expert; record a longer one")
        sizes = _ten_sizes(recorded.total_experts) if slots is None else parse_sizes(slots, recorded.total_experts)
        with reading(f"cannot make the folder {output}"):
            output.mkdir(parents=True, exist_ok=True)
        figures = {
            "hit-rates.png": draw_hit_rates(play(recorded, policy, sizes), recorded.total_experts),
            "expert-use.png": draw_expert_use(recorded),
            "stalls.png": draw_stalls(recorded),
        }
        for name, figure in figures.items():
            if figure is None:
                typer.echo(f"{name} is left out: the trace has no times")
            else:
                save(figure, output / name)
                typer.echo(str(output / name))


def _ten_sizes(total_experts: int) -> list[int]:
    """Closer together where hit rates differ most; fewer than ten where there are few experts."""
    return sorted({max(1, total_experts * percent // 100) for percent in (5, 10, 20, 30, 40, 50, 60, 75, 90, 100)})
