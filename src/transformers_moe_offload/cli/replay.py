"""`moe-offload replay`: hit rates of a trace under other policies and cache sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.options import load_trace
from transformers_moe_offload.cli.writing import expect_file, write_json
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.policies import ORACLE, policy_names
from transformers_moe_offload.routing import RoutingTrace
from transformers_moe_offload.tracing import Replay, Trace, TraceError
from transformers_moe_offload.tracing import replay as replay_trace
from transformers_moe_offload.untrusted import quoted


def replay(trace: Path, policy: list[str] | None, slots: str, json_file: Path | None) -> None:
    """Print the hit rates of each policy and size, Belady's oracle last."""
    expect_file("--json", json_file)
    recorded, _ = visits_of(trace)
    sizes = parse_sizes(slots, recorded.total_experts)
    replays = play(recorded, policy, sizes)
    console = Console()
    console.print(f"{trace}: {recorded}", style="bold", soft_wrap=True, highlight=False)
    console.print(_table(replays, sizes, recorded.total_experts))
    write_json(json_file, _as_json(recorded, replays))


def visits_of(path: Path) -> tuple[Trace, RoutingTrace | None]:
    """The visits as a trace, and the recording of the routing that they are from, if the path is its folder."""
    found = load_trace(path)
    recorded = found if isinstance(found, Trace) else found.to_cache_trace()
    if not recorded.num_asked:
        raise TraceError(f"{path} holds no visit that wants an expert; record a longer one")
    return recorded, found if isinstance(found, RoutingTrace) else None


def parse_sizes(text: str, total_experts: int) -> list[int]:
    """Slots for each of the sizes in `10%,25%,64`, smallest first."""
    return sorted({_parse_size(part.strip(), total_experts) for part in text.split(",")})


def _parse_size(text: str, total_experts: int) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)%|(\d{1,9})", text)
    if match is None:
        raise CommandError(f"--slots: {text!r} is neither a number of slots, such as 64, nor a share, such as 25%")
    num_slots = int(match[2]) if match[2] else int(float(match[1]) / 100 * total_experts)
    if not 1 <= num_slots <= total_experts:
        raise CommandError(
            f"--slots: {text} comes to {num_slots} slots, and the trace's model has {total_experts} experts; "
            f"ask for at least 1 and at most {total_experts} of them"
        )
    return num_slots


def play(trace: Trace, policies: Sequence[str] | None, sizes: Sequence[int]) -> list[Replay]:
    """The replays of each policy and size, the oracle's last, with a progress bar."""
    known = [*policy_names(), ORACLE]
    for name in policies or ():
        if name not in known:
            raise CommandError(
                f"--policy {quoted(name)} is not a known policy; choose one of {known}{did_you_mean(name, known)}"
            )
    names = [name for name in dict.fromkeys(policies or policy_names()) if name != ORACLE]
    todo = [(name, num_slots) for name in (*names, ORACLE) for num_slots in sizes]
    console = Console(stderr=True)
    bar = track(todo, "replays", console=console, transient=True, disable=not console.is_terminal)
    return [replay_trace(trace, name, num_slots) for name, num_slots in bar]


def _table(replays: Sequence[Replay], sizes: Sequence[int], total_experts: int) -> Table:
    table = Table("policy", box=box.SIMPLE_HEAD)
    for num_slots in sizes:
        table.add_column(f"{num_slots} slots\n{num_slots / total_experts:.1%}", justify="right", no_wrap=True)
    rates = {(played.policy, played.num_slots): played.hit_rate for played in replays}
    names = dict.fromkeys(played.policy for played in replays)
    best = {size: max((rates[name, size] for name in names if name != ORACLE), default=None) for size in sizes}
    for name in names:
        if name == ORACLE:
            table.add_section()
        cells = [(rates[name, num_slots], best[num_slots]) for num_slots in sizes]
        table.add_row(name, *(f"[bold]{rate:.1%}[/bold]" if rate == top else f"{rate:.1%}" for rate, top in cells))
    return table


def _as_json(trace: Trace, replays: Sequence[Replay]) -> dict[str, Any]:
    return {
        "layers": list(trace.layer_names),
        "num_experts": list(trace.num_experts),
        "visits": len(trace.visits),
        "steps": len(trace.step_tokens),
        "replays": [
            {
                "policy": played.policy,
                "slots": played.num_slots,
                "hits": played.hits,
                "hit_rate": played.hit_rate,
                "hits_per_layer": [stats.hits for stats in played.per_layer.values()],
                "misses_per_layer": [stats.misses for stats in played.per_layer.values()],
            }
            for played in replays
        ],
    }
