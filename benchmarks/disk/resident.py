"""Measure one model at several residencies, in one process and taking turns, so that ratios mean something."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.bench.passage import Passage, passage_for
from transformers_moe_offload.bench.session import facts
from transformers_moe_offload.bench.workload import Workload, run


def measure_residencies(
    folder: str, is_copied: bool, percents: list[int], compared: int, rounds: int, prompt_tokens: int, steps: int
) -> dict[str, Any]:
    """Runs by percent, one of each a round; greedy, beams and a batch at the percent `compared`."""
    # A cache that holds everything is made of copies, and stays so when its budget changes; a smaller one is mapped.
    config = OffloadConfig(cache_budget=f"{compared}%", mmap=False if is_copied else "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    passage = passage_for(model, folder)
    lengths = {"prompt_tokens": prompt_tokens, "steps": steps}
    decode, beams = Workload(name="decode", **lengths), Workload(name="beam 5", beams=5, **lengths)
    answer: dict[str, Any] = {"model": facts(model), "passage": passage.source, "dense_bytes": _dense_bytes(model)}
    runs: dict[str, list[Any]] = {str(percent): [] for percent in percents}
    searched: dict[str, list[Any]] = {"decode": [], "beam 5": []}
    for _ in range(rounds):
        for percent in percents:
            model.moe_offload.resize(f"{percent}%")
            run(model, decode, passage)
            runs[str(percent)].append(asdict(run(model, decode, passage)))
        model.moe_offload.resize(f"{compared}%")
        for work in (decode, beams):
            run(model, work, passage)
            searched[work.name].append(asdict(run(model, work, passage)))
    answer |= {"runs": runs, "searched": searched}
    batch = Workload(name="batch 8", batch=8, **lengths)
    answer["batch"] = {
        str(percent): _batch(model, batch, passage, f"{percent}%") for percent in (compared, percents[-1])
    }
    answer["batch"]["one slot"] = _batch(model, batch, passage, model.moe_offload.plan.smallest_budget)
    return answer


def _dense_bytes(model: Any) -> int:
    """Bytes of weights, beside the experts, that every step multiplies with: all but an embedding of its own."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p is not embedding or p is head)


def _batch(model: Any, work: Workload, passage: Passage, budget: str | int) -> dict[str, Any]:
    """One run of a batch, with the experts that its routers really wanted, counted beside the cache."""
    model.moe_offload.resize(budget)
    run(model, work, passage)
    wanted: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        top_k_index = (*args, *kwargs.values())[1]
        wanted.append(len(top_k_index.unique()))

    layers = sparse_layers(model)
    hooks = [module.register_forward_pre_hook(count, with_kwargs=True) for module, _ in layers]
    try:
        measured = run(model, work, passage)
    finally:
        for hook in hooks:
            hook.remove()
    return {"run": asdict(measured), "wanted": sum(wanted[len(layers) :])}  # less the prompt's
