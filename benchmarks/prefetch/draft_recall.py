"""How well does a draft name the experts that the verification of its tokens wants?

    python -m benchmarks.prefetch.draft_recall          # the small trained model, about two minutes
    python -m benchmarks.prefetch.draft_recall --quick  # every line of it once, figures without meaning

Two predictions of the experts of a layer that one verification wants, all its tokens together: those that the same
layer of the draft chose for these tokens, where the draft is the model itself in fewer bits; and those that each
drafted token took most often in the texts so far, which needs no draft with experts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import show, write
from benchmarks.quality.held_out import load_text
from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.bench.tables import Table

BITS, DRAFTED = (2, 3, 4), (3, 6)


def measure_draft_recall(
    quick: Annotated[bool, typer.Option("--quick", help="Try every line once, with next to no text.")] = False,
    text: Annotated[Path | None, typer.Option(help="A texts.json of examples/models/corpus.py.")] = None,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
) -> None:
    """Measure drafts in some numbers of bits, greedy and sampled."""
    torch.set_num_threads(threads)
    prompt_tokens, new_tokens, prompts = (16, 16, 1) if quick else (192, 96, 2)
    windows = load_text(text, held_out=prompts, trained=1, length=prompt_tokens)
    target = _load()
    rows = {}
    for bits in BITS[:1] if quick else BITS:
        draft = _load(experts=HqqFormat(nbits=bits, group_size=32))
        draft.generation_config.update(num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
        for drafted, samples in product(DRAFTED, (False, True)):
            draft.generation_config.num_assistant_tokens = drafted
            watched = Watched(target, draft)
            for seed, prompt in enumerate(windows.held_out):
                watched.generate(prompt[None], new_tokens, samples, seed)
            rows[f"{bits} bits, {drafted} drafted, {'sampled' if samples else 'greedy'}"] = watched.shares()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(TINY_MOE, threads),
        "facts": {
            "model": "examples/models/tiny-moe; 16 experts in each of 8 layers, 4 for each token",
            "text": f"{new_tokens} tokens after each of {len(windows.held_out)} prompts of {prompt_tokens}, "
            f"{windows.origin}",
            "predicted": "drafts' experts 85 to 95 %, by token far below them",
        },
        "rows": rows,
    }
    show(write(results, "draft-recall", result), result, [table(rows)], [])


def _load(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="100%", **options))


class Tally:
    """How many experts were wanted, named, and both."""

    def __init__(self) -> None:
        self.wanted = self.named = self.both = 0

    def count(self, wanted: set[int], named: set[int]) -> None:
        """One layer of one verification."""
        self.wanted += len(wanted)
        self.named += len(named)
        self.both += len(wanted & named)


class Watched:
    """A model and its draft, whose choices are watched while they generate."""

    def __init__(self, target: Any, draft: Any) -> None:
        self._target, self._draft = target, draft
        self._tokens: list[int] = []
        """Of the forward that the target does."""
        self._named: dict[int, set[int]] = defaultdict(set)
        """By layer, what the draft has chosen since that layer of the target was last computed."""
        self._taken: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        """By layer and token, how often it has taken each expert."""
        self.by_draft, self.by_token = Tally(), Tally()
        self.verifications = self.union = 0

    def generate(self, prompt: Tensor, new_tokens: int, samples: bool, seed: int) -> None:
        """Generate once. prompt (1, S) int64."""
        hooks = [self._target.register_forward_pre_hook(self._forward_begins, with_kwargs=True)]
        for model, seen in ((self._target, self._verified), (self._draft, self._drafted)):
            for place, (module, _) in enumerate(sparse_layers(model)):
                hooks.append(module.register_forward_pre_hook(lambda _, args, at=place, to=seen: to(at, args[1])))
        self._named.clear()
        set_seed(seed)
        try:
            self._target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=2,
                assistant_model=self._draft,
                **({"do_sample": True, "top_k": 0} if samples else {"do_sample": False}),
            )
        finally:
            for hook in hooks:
                hook.remove()

    def shares(self) -> dict[str, float]:
        """What was found, by column of the table."""
        return {
            "experts wanted": self.union / self.verifications,
            "draft: recall": self.by_draft.both / self.by_draft.wanted,
            "draft: correct": self.by_draft.both / self.by_draft.named,
            "token: recall": self.by_token.both / self.by_token.wanted,
            "token: correct": self.by_token.both / self.by_token.named,
        }

    def _forward_begins(self, module: Any, args: Any, kwargs: Any) -> None:
        self._tokens = kwargs["input_ids"][0].tolist()

    def _drafted(self, layer: int, index: Tensor) -> None:
        if len(index) <= 2:  # not the prompt; of two tokens the first has been verified
            self._named[layer] |= set(index[-1].tolist())

    def _verified(self, layer: int, index: Tensor) -> None:
        chosen = index.tolist()
        if len(chosen) <= 1 + max(DRAFTED):
            wanted = set(index.unique().tolist())
            usual = [self._taken[layer, token].most_common(index.shape[1]) for token in self._tokens]
            self.by_draft.count(wanted, self._named[layer])
            self.by_token.count(wanted, {expert for one in usual for expert, _ in one})
            self.union += len(wanted)
            self.verifications += 1
        for token, experts in zip(self._tokens, chosen, strict=True):
            self._taken[layer, token].update(experts)
        self._named[layer] = set()


def table(rows: dict[str, dict[str, float]]) -> Table:
    """A row for each draft."""
    header = ["draft", "experts wanted", "draft's: recall", "correct", "token's: recall", "correct"]
    lines = [
        [name, f"{found['experts wanted']:.1f}", *(f"{share:.1%}" for share in list(found.values())[1:])]
        for name, found in rows.items()
    ]
    return Table("Of the 16 experts of a layer that one verification wants", header, lines)


if __name__ == "__main__":
    typer.run(measure_draft_recall)
