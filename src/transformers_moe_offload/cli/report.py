"""`moe-offload report`: draw a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from transformers_moe_offload.cli.replay import parse_sizes, play, visits_of
from transformers_moe_offload.routing.report import sections_of
from transformers_moe_offload.tracing import Replay
from transformers_moe_offload.tracing.page import Section, make_page, save_page
from transformers_moe_offload.tracing.report import (
    draw_expert_use,
    draw_hit_rates,
    draw_stalls,
    make_figure,
    save,
)
from transformers_moe_offload.untrusted import reading


def report(trace: Path, output: Path, policy: list[str] | None, slots: str | None) -> None:
    """Draw the trace into a folder of plots, or one page."""
    recorded, routed = visits_of(trace)
    make_figure()  # raises without matplotlib: after errors in the input, and before the replays, which take a while
    sizes = _ten_sizes(recorded.total_experts) if slots is None else parse_sizes(slots, recorded.total_experts)
    replays = play(recorded, policy, sizes)
    figures = {
        "hit-rates.png": draw_hit_rates(replays, recorded.total_experts),
        "expert-use.png": draw_expert_use(recorded),
        "stalls.png": draw_stalls(recorded),
    }
    if output.suffix.lower() in (".html", ".htm"):
        sections = [] if routed is None else sections_of(routed)
        sections += _sections(figures, replays, recorded.total_experts, has_routing=routed is not None)
        save_page(make_page(f"Trace {trace.name}", str(routed if routed is not None else recorded), sections), output)
        typer.echo(str(output))
        return
    if routed is not None:
        figures |= {
            f"{section.title.lower()}.png": section.figure
            for section in sections_of(routed)
            if section.figure is not None
        }
    _save_figures(figures, output, has_routing=routed is not None)


def _sections(
    figures: dict[str, Any], replays: list[Replay], total_experts: int, *, has_routing: bool
) -> list[Section]:
    """Hit rates of replays, use of experts, and the recorded stalls."""
    sections = [
        Section(
            "Hit rates",
            "The trace played through the cache with each policy, and Belady's oracle, the limit for all of them. "
            "Table: experts resident when they were asked for, by the slots' share of all experts.",
            figures["hit-rates.png"],
            _rates(replays, total_experts),
        )
    ]
    if not has_routing:
        sections.append(Section("Experts", "Red: wanted more often than others.", figures["expert-use.png"]))
    if figures["stalls.png"] is not None:
        text = "Times of the cache that the trace was recorded with."
        sections.append(Section("Stalls", text, figures["stalls.png"]))
    return sections


def _rates(replays: list[Replay], total_experts: int) -> list[dict[str, Any]]:
    """A row for each policy."""
    rows: dict[str, dict[str, Any]] = {}
    for played in replays:
        share = f"{100 * played.num_slots / total_experts:.0f}%"
        rows.setdefault(played.policy, {"policy": played.policy})[share] = f"{100 * played.hit_rate:.1f}%"
    return list(rows.values())


def _save_figures(figures: dict[str, Any], folder: Path, *, has_routing: bool) -> None:
    with reading(f"cannot make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            save(figure, folder / name)
            typer.echo(str(folder / name))
        elif not has_routing:
            typer.echo(f"{name} is left out: the trace has no times")


def _ten_sizes(total_experts: int) -> list[int]:
    """Closer together where hit rates differ most; fewer than ten where there are few experts."""
    return sorted({max(1, total_experts * percent // 100) for percent in (5, 10, 20, 30, 40, 50, 60, 75, 90, 100)})
