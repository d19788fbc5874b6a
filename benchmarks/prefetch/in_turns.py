"""Measure the same work with and without prefetch, and without it a second time, in one process and taking turns.

The second time is the control: what differs there is chance, and where the models lie in memory.

"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import drop, warm
from transformers_moe_offload.bench.passage import Passage, passage_for
from transformers_moe_offload.bench.session import facts, unmap_dense
from transformers_moe_offload.bench.workload import Workload, run
from transformers_moe_offload.config import PrefetchConfig

ROWS = {"off": None, "on": PrefetchConfig(), "control": None}

SETTLING_S = 45.0
"""No more than this is spent on settling: steps that take longer are measured in the middle of a trial."""


def measure_in_turns(
    folder: str,
    budget: str,
    state: str,
    is_copied: bool,
    works: list[dict[str, Any]],
    rounds: int,
    settling_steps: int,
) -> dict[str, Any]:
    """Runs of each work by row, one of each a round; who begins a round changes from one to the next.

    Before that, with prefetch, `settling_steps` of it that are not counted, in which the controller decides. What its
    trials cost is bounded by itself (docs/prefetch.md) and tested there; here is measured what it has settled for.
    """
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            folder,
            moe_offload=OffloadConfig(
                cache_budget=budget,
                prefetch=prefetch,
                mmap=False if is_copied else "auto",
                direct_io=state == "cold",  # as where RAM is short
            ),
        ).eval()
        for name, prefetch in ROWS.items()
    }
    files = files_of(store_of(models["off"]))
    passage = passage_for(models["off"], folder)
    warm(files)
    for model in models.values():
        unmap_dense(model)
    answer: dict[str, Any] = {"model": facts(models["on"]), "passage": passage.source, "works": {}, "settled": {}}

    def before_forward() -> None:
        if state == "cold":
            drop(files)

    for work in (Workload(**fields) for fields in works):
        runs: dict[str, list[Any]] = {name: [] for name in models}
        answer["settled"][work.name] = _settle(models["on"], work, passage, before_forward, settling_steps)
        for name in ("off", "control"):
            run(models[name], work, passage, before_forward)
        order = list(models)
        for _ in range(rounds):
            for name in order:
                runs[name].append(asdict(run(models[name], work, passage, before_forward)))
            order = order[1:] + order[:1]
        answer["works"][work.name] = runs
    return answer


def _settle(model: Any, work: Workload, passage: Passage, before_forward: Callable[[], None], enough: int) -> int:
    """Do the work until the controller must have decided about it; returns the steps that were done."""
    steps, ends = 0, time.monotonic() + SETTLING_S
    while True:
        run(model, work, passage, before_forward)
        steps += work.steps
        if work.is_prefill or steps >= enough or time.monotonic() > ends:
            return steps
