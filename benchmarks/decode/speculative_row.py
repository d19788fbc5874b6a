"""One model at one residency: plain generation and assisted generation in turns, in one process.

A run is one `generate` call from an empty cache. What is measured begins with the first token after the prompt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed
from transformers.generation.streamers import BaseStreamer

from benchmarks import TINY_MOE
from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.bench.session import facts, unmap_dense

DENSE = TINY_MOE.with_name("tiny-dense")
"""A dense model with the tokenizer of the small trained mixture."""

DRAFT_BITS = 2


def measure_speculative(
    folder: str, group_size: int, percent: int, samples: bool, prompts: list[list[int]], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Runs by way, one of each prompt and round; ways take turns, and another one begins each round."""
    target = _load(folder, cache_budget=f"{percent}%", mmap=False, direct_io=True)
    draft = _load(folder, cache_budget="100%", experts=HqqFormat(nbits=DRAFT_BITS, group_size=group_size))
    dense = AutoModelForCausalLM.from_pretrained(DENSE).eval()
    for one in (draft, dense):  # as many tokens each time, however sure the draft is
        one.generation_config.update(num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
    plan = target.moe_offload.plan
    budget = plan.expert_bytes * percent // 100
    left = budget - draft.moe_offload.plan.cache_bytes
    ways = ways_of(dense, draft, budget, left if left >= plan.smallest_budget else None)
    runs: dict[str, list[Any]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            target.moe_offload.resize(way.budget)
            for seed, prompt in enumerate(prompts):
                runs[way.name].append(_run(target, way, torch.tensor([prompt]), new_tokens, samples, seed))
        ways = ways[1:] + ways[:1]
    return {
        "model": facts(target),
        "draft_bytes": draft.moe_offload.plan.cache_bytes,
        "dense_bytes": sum(one.nbytes for one in dense.parameters()),
        "runs": runs,
    }


@dataclass(frozen=True)
class Way:
    """One way to generate."""

    name: str
    budget: int
    """Bytes for the target's experts."""
    draft: Any = None
    """The assistant; None without one."""
    drafted: int = 0
    """Tokens that are drafted for each verification; without a draft they are looked up in the text so far."""

    @property
    def options(self) -> dict[str, Any]:
        """What `generate` is told."""
        if self.draft is not None:
            self.draft.generation_config.num_assistant_tokens = self.drafted
            return {"assistant_model": self.draft}
        return {"prompt_lookup_num_tokens": self.drafted} if self.drafted else {}


def ways_of(dense: Any, draft: Any, budget: int, left: int | None) -> list[Way]:
    """All ways; `left` is what a draft in few bits leaves of the budget, None if that is too little."""
    bits = f"itself in {DRAFT_BITS} bits"
    return [
        Way("plain", budget),
        Way("lookup, 5", budget, None, 5),
        Way("lookup, 10", budget, None, 10),
        Way("a dense model, 4", budget, dense, 4),
        Way(f"{bits}, 4, beside the budget", budget, draft, 4),
        *(Way(f"{bits}, {drafted}", left, draft, drafted) for drafted in (4, 8) if left is not None),
    ]


class _Watch(BaseStreamer):
    """Counts and times what comes after the first tokens that a model has generated."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._puts = 0
        self._began = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.rows: list[int] = []
        """Tokens of each forward of the target."""

    def put(self, value: Tensor) -> None:
        """The prompt, then the tokens that each forward has brought."""
        now = time.perf_counter()
        self._puts += 1
        if self._puts == 2:
            self.rows.clear()
            self._target.moe_offload.reset_stats()
            self._began = time.perf_counter()
        elif self._puts > 2:
            self.tokens += value.numel()
            self.seconds = now - self._began

    def end(self) -> None:
        """Nothing is left to do."""

    def forward_begins(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the target."""
        self.rows.append(kwargs["input_ids"].shape[1])


def _run(target: Any, way: Way, prompt: Tensor, new_tokens: int, samples: bool, seed: int) -> dict[str, Any]:
    watch = _Watch(target)
    sampling = {"do_sample": True, "top_k": 0} if samples else {"do_sample": False}
    hook = target.register_forward_pre_hook(watch.forward_begins, with_kwargs=True)
    target.moe_offload.clear()
    set_seed(seed)
    try:
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=2,
            streamer=watch,
            **sampling,
            **way.options,
        )
    finally:
        hook.remove()
    stats = target.moe_offload.stats()
    return {
        "tokens": watch.tokens,
        "seconds": watch.seconds,
        "forwards": len(watch.rows),
        "rows": sum(watch.rows),
        "asked": stats.asked,
        "misses": stats.misses,
        "disk_bytes": stats.disk_bytes,
        "stall_ms": stats.stall_ms,
        "text": " ".join(map(str, out[0, prompt.shape[1] :].tolist())),
    }


def _load(folder: str, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(**options)).eval()
    unmap_dense(model)
    return model
