"""How well predictors know which experts come next, and how often an LRU cache has them already: the two panels of
figure 2 of arXiv 2312.17238, for the small MoE that we trained.

    python -m benchmarks.prefetch.prefetch_recall  # half a minute; results/prefetch-recall-tiny-moe.{md,png,json}

Routing is recorded from text that the model samples; predictors and policy are those of the package, asked token by
token as they are during decoding. Nothing is loaded or timed.
"""

# T tokens, K experts per token, E experts, H hidden, L sparse layers, R experts ranked by a predictor

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks import RESULTS, TINY_MOE
from benchmarks.prefetch.recall_page import as_markdown, draw, rounded
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.routers.find import find_router
from transformers_moe_offload.hf.routers.probe import RouterProbe
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.prefetch.predictors import LayerShape, Predictor, make_predictor

PROMPTS = {
    "prose": (
        "If this option is set, the",
        "NAME\n       mount - mount a filesystem\n\nDESCRIPTION\n",
        "Permission is hereby granted, free of charge, to any person",
    ),
    "python": (
        'def read(path):\n    """',
        "import os\nimport sys\n\nclass Parser:\n",
        "    def test_empty(self):\n        self.assertEqual(",
    ),
    "c": (
        "#ifndef _LINUX_QUEUE_H\n#define _LINUX_QUEUE_H\n\nstruct",
        "/* Return the number of bytes",
        "static inline int ",
    ),
}

AHEAD = (1, 2, 4, 6)
"""Layers between the layer that guesses and the one that is guessed."""

CACHED = 6
"""Slots a layer, of 16 experts, for the question what prefetching is left to do: about 40 % resident."""


@dataclass(frozen=True)
class Text:
    """What one sampled text did to the sparse layers, prompt included."""

    hidden: list[Tensor]
    """What reached each layer's experts, L of (T, H)."""
    chosen: list[list[list[int]]]
    """Experts by layer and token: L of T of K."""

    @property
    def num_tokens(self) -> int:
        return len(self.chosen[0])


class Tally:
    """Shares of chosen experts that were among the n best guesses, n from 1 on."""

    def __init__(self, num_ranks: int) -> None:
        self._found = [0] * (num_ranks + 1)
        self._num_chosen = 0

    def count(self, chosen: Iterable[int], ranked: Sequence[int]) -> None:
        rank_of = {expert: rank for rank, expert in enumerate(ranked, start=1)}
        for expert in chosen:
            self._num_chosen += 1
            if rank_of.get(expert, len(self._found)) < len(self._found):
                self._found[rank_of[expert]] += 1

    def recall(self) -> list[float]:
        total, recalls = 0, []
        for found in self._found[1:]:
            total += found
            recalls.append(total / max(1, self._num_chosen))
        return recalls


def prefetch_recall(
    tokens: Annotated[int, typer.Option(help="Tokens sampled after each prompt.")] = 320,
    threads: Annotated[int, typer.Option(help="Threads torch may use.")] = 1,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure predictors and LRU on text sampled from tiny-moe."""
    torch.set_num_threads(threads)
    where = conditions(TINY_MOE, threads)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32, experts_implementation="eager").eval()
    paths = [path for path, _, _ in find_experts(model)]
    probes = [find_router(model, path) for path in paths]
    assert all(probe is not None and probe.is_normed for probe in probes)
    shapes = [LayerShape(i, model.config.num_experts, model.config.num_experts_per_tok) for i in range(len(paths))]
    texts = [sampled(model, paths, prompt, tokens) for prompts in PROMPTS.values() for prompt in prompts]

    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "model": "examples/models/tiny-moe, float32: "
        f"{len(paths)} layers of {shapes[0].num_experts} experts, {shapes[0].top_k} a token",
        "text": f"{len(texts)} texts, three of each domain, of {tokens} tokens sampled at temperature 1 (seed 0), "
        f"and their prompts: {sum(text.num_tokens for text in texts)} tokens",
        "ahead": AHEAD,
        "cached": CACHED,
        "predictors": {
            name: measured(make, texts, shapes) for name, make in predictors(probes, shapes).items()
        },
        "lru_hit_ratio": [
            [hit_ratio(texts, layer, slots) for slots in range(1, shapes[0].num_experts + 1)]
            for layer in range(len(paths))
        ],
        "top_k": shapes[0].top_k,
        "num_experts": shapes[0].num_experts,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path = results / "prefetch-recall-tiny-moe.json"
    path.write_text(json.dumps(rounded(result), indent=1) + "\n")
    page = as_markdown(result)
    path.with_suffix(".md").write_text(page)
    draw(result, path.with_suffix(".png"))
    print(page)


@torch.no_grad()
def sampled(model: Any, paths: list[str], prompt: str, num_tokens: int) -> Text:
    """Let the model continue a prompt, and record its sparse layers over all of it."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    ids = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        do_sample=True,
        top_k=0,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    inputs: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args}))
        for path in paths
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return Text([inputs[path][0] for path in paths], [inputs[path][1].tolist() for path in paths])


def predictors(
    probes: list[RouterProbe], shapes: list[LayerShape]
) -> dict[str, tuple[Callable[[], Predictor], Callable[[int, Tensor], Tensor]]]:
    """What is compared: how to make it, and what it is shown of the (1, H) hidden states of a layer."""
    with_norms = {layer: probe.scores_of_residual for layer, probe in enumerate(probes)}
    without_norms = {layer: probe.scores for layer, probe in enumerate(probes)}
    return {
        "next_router": (
            lambda: make_predictor("next_router", shapes, with_norms),
            lambda layer, hidden: probes[layer].residual(hidden),
        ),
        "next_router, norms ignored": (
            lambda: make_predictor("next_router", shapes, without_norms),
            lambda layer, hidden: hidden,
        ),
        "transition": (lambda: make_predictor("transition", shapes, {}), lambda layer, hidden: hidden),
        "last_token": (lambda: make_predictor("last_token", shapes, {}), lambda layer, hidden: hidden),
    }


def measured(
    made: tuple[Callable[[], Predictor], Callable[[int, Tensor], Tensor]], texts: list[Text], shapes: list[LayerShape]
) -> dict[str, dict[int, list[float]]]:
    """Recall of one predictor by layers ahead and experts prefetched; of all chosen, and of those an LRU would miss."""
    make, shown = made
    predictor, num_layers, num_ranks = make(), len(shapes), shapes[0].num_ranked
    of_all = {ahead: Tally(num_ranks) for ahead in AHEAD}
    of_missed = {ahead: Tally(num_ranks) for ahead in AHEAD}
    confidences: list[tuple[float, bool]] = []
    for text in texts:
        caches = [LruCache(CACHED) for _ in shapes]
        for token in range(text.num_tokens):
            guesses: dict[tuple[int, int], list[int]] = {}
            for layer in range(num_layers):
                chosen = text.chosen[layer][token]
                missed = caches[layer].missed(chosen)
                for ahead in AHEAD:
                    ranked = guesses.pop((layer, ahead), None)
                    if ranked is not None:
                        of_all[ahead].count(chosen, ranked)
                        absent = [expert for expert in ranked if not caches[layer].has(expert)]
                        of_missed[ahead].count(missed, absent)
                caches[layer].use(chosen)
                predictor.observe(layer, chosen)
                for ahead in AHEAD:
                    target = layer + ahead
                    if target < num_layers:
                        hidden = shown(layer, text.hidden[layer][token : token + 1])
                        predicted = predictor.predict(layer, [target], hidden)
                        guesses[target, ahead] = [prediction.expert.expert for prediction in predicted]
                        wanted = text.chosen[target][token]
                        confidences += [(p.confidence, p.expert.expert in wanted) for p in predicted]
    return {
        "recall": {ahead: tally.recall() for ahead, tally in of_all.items()},
        "recall_of_misses": {ahead: tally.recall() for ahead, tally in of_missed.items()},
        "calibration": calibration(confidences),
    }


def calibration(confidences: list[tuple[float, bool]]) -> dict[str, float]:
    """Mean distance between what was promised and what came true, over ten classes of confidence."""
    classes: dict[int, list[tuple[float, bool]]] = {}
    for confidence, came_true in confidences:
        classes.setdefault(min(9, int(10 * confidence)), []).append((confidence, came_true))
    gaps = sum(abs(sum(confidence - came_true for confidence, came_true in one)) for one in classes.values())
    return {"expected_calibration_error": gaps / len(confidences)}


class LruCache:
    """The slots of one layer under the package's LRU; all experts of a token are one request."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._policy = LRU()
        self._residents: set[ExpertId] = set()

    def has(self, expert: int) -> bool:
        return ExpertId(0, expert) in self._residents

    def missed(self, wanted: Sequence[int]) -> list[int]:
        return [expert for expert in wanted if not self.has(expert)]

    def use(self, wanted: Sequence[int]) -> None:
        """Residents are used first, then the others take the slots of those that are not wanted while there are any."""
        experts = [ExpertId(0, expert) for expert in wanted]
        for expert in sorted(experts, key=lambda expert: expert not in self._residents):
            if expert not in self._residents:
                if len(self._residents) == self._num_slots:
                    leaving = list(self._policy.candidates())
                    victim = next((one for one in leaving if one not in experts), leaving[0])
                    self._policy.forget(victim)
                    self._residents.remove(victim)
                self._policy.admit(expert)
                self._residents.add(expert)
            self._policy.use(expert)


def hit_ratio(texts: list[Text], layer: int, num_slots: int) -> float:
    """Share of a layer's choices that are resident when the token asks, the cache empty before each text."""
    hits = asked = 0
    for text in texts:
        cache = LruCache(num_slots)
        for chosen in text.chosen[layer]:
            asked += len(chosen)
            hits += len(chosen) - len(cache.missed(chosen))
            cache.use(chosen)
    return hits / asked


if __name__ == "__main__":
    typer.run(prefetch_recall)
