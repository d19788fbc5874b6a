"""Show what was measured: conditions, bandwidths, dispatch, and one table of workloads for each page cache state."""

from __future__ import annotations

from typing import Any

from transformers_moe_offload.bench.conditions import described
from transformers_moe_offload.bench.limit import as_share
from transformers_moe_offload.bench.session import STATES
from transformers_moe_offload.bench.tables import Table, mib


def facts(result: dict[str, Any]) -> dict[str, str]:
    """The conditions that the figures hold for."""
    model, protocol = result["model"], result["protocol"]
    return described(result["conditions"]) | {
        "torch threads": str(result["conditions"]["torch_threads"]),
        "model": f"{model['name']}: {model['class']}, {model['dtype']}, on {model['device']}",
        "experts": f"{model['experts']} in {model['sparse_layers']} sparse layers, {mib(model['expert_bytes'])} MiB, "
        f"{model['expert_dtype']}",
        "cache": f"{model['slots']} slots, {mib(model['cache_bytes'])} MiB, "
        f"{'mapped' if model['is_mapped'] else 'copied'}; "
        + ", ".join(f"{name}={value}" for name, value in model["config"].items() if name != "quant_method"),
        "lengths": f"{protocol['decode_tokens']} tokens decoded after {protocol['prompt_tokens']} of "
        f"{result['passage']}; medians of {protocol['runs']} runs, fewer where a row takes longer than "
        f"{protocol['row_s']:g} s",
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Every table that has figures."""
    found = [_bandwidths(result["bandwidth"]), _dispatch(result["dispatch"], result["dispatch_resident"])]
    some = next(iter(result["workloads"].values()))
    return found + [_workloads(result, state) for state in STATES if state in some]


def _bandwidths(bandwidth: dict[str, Any]) -> Table:
    disk, ram, link = bandwidth["disk"], bandwidth["ram"], bandwidth["link"]
    how = f"{disk['threads']} threads, up to {mib(disk['range_bytes'])} MiB a read"
    speeds = {
        f"disk, cold ({how})": disk["cold_bytes_per_s"],
        f"page cache, warm ({how})": disk["warm_bytes_per_s"],
        "RAM, copied": ram["copy_bytes_per_s"],
        f"RAM, read ({ram['fastest_read']})": ram["read_bytes_per_s"],
    }
    if link is not None:
        speeds["link, from pinned memory"] = link["pinned_bytes_per_s"]
        speeds["link, from ordinary memory"] = link["pageable_bytes_per_s"]
    rows = [[name, mib(speed) if speed is not None else "not measured"] for name, speed in speeds.items()]
    return Table("Bandwidth", ["where", "MiB/s"], rows)


def _dispatch(found: dict[str, Any], resident: dict[str, Any] | None) -> Table:
    columns = {"us": found["us_per_layer"]}
    if resident is not None:
        columns["us, cache for all"] = resident["us_per_layer"]
    rows = [
        [name, *("not measured" if part[name] is None else f"{part[name]:.1f}" for part in columns.values())]
        for name in found["us_per_layer"]
    ]
    resident_share = f"{found['resident_share']:.0%} of the experts resident"
    return Table(f"One sparse layer at batch 1, {resident_share}", ["part", *columns], rows)


def _workloads(result: dict[str, Any], state: str) -> Table:
    title = f"Page cache {state} (disk: MiB per forward; stall: ms per forward; limit: tokens/s)"
    header = [
        "workload", "runs", "tokens/s", "min to max", "hit rate", "disk", "stall",
        "limit", "by", "reached", "of resident",
    ]  # fmt: skip
    rows = []
    for name, entry in result["workloads"].items():
        found = entry[f"{state}_summary"]
        rows.append([
            name,
            str(found["runs"]),
            f"{found['tokens_per_s']:.2f}",
            f"{found['slowest_tokens_per_s']:.2f} to {found['fastest_tokens_per_s']:.2f}",
            f"{found['hit_rate']:.1%}",
            mib(found["disk_bytes_per_forward"]),
            f"{found['stall_ms_per_forward']:.1f}",
            f"{found['limit_tokens_per_s']:.2f}",
            found["limited_by"],
            as_share(found["reached"]),
            as_share(found["share_of_resident_speed"], of="resident"),
        ])  # fmt: skip
    return Table(title, header, rows)
