"""The way of a decode step through the package, on a CPU with everything resident."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import transformers_moe_offload
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.kernels import native
from transformers_moe_offload.slots import mapped

from .conftest import TINY_MOE

DRAWING = Path(__file__).parents[2] / "docs/pictures/draw.py"
PACKAGE = Path(transformers_moe_offload.__file__).parent

HALVES = {"cache/steps.py": "cache/cache.py", "policies/unused_first.py": "policies/lru.py"}
"""Files of base classes, which are one module with the class that is used."""

compiled = pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")

IN_MANY_CALLS = {"cache/cache.py", "cache/visit.py"}
"""A step goes back and forth between these two, and with the layer's forward."""


def module_of(frame):
    """The file of a frame that runs our code; the kernels are one module, and so are the modules beside the experts."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return None
    found = str(path.relative_to(PACKAGE))
    for folder in ("kernels", "hf/few_rows"):
        if found.startswith(f"{folder}/"):
            return folder
    return HALVES.get(found, found)


def modules_of_step(model, token):
    """Each module that a decode step enters -> the modules from which it is called."""
    callers: dict[str, set[str | None]] = {}

    def watch(frame, event, _):
        module = module_of(frame) if event == "call" else None
        if module is None:
            return
        caller = frame.f_back
        while caller is not None and module_of(caller) is None:  # torch's and Transformers' own frames
            caller = caller.f_back
        if caller is None or module_of(caller) != module:
            callers.setdefault(module, set()).add(caller and module_of(caller))

    with torch.inference_mode():
        for profile in (None, watch):  # the first time, weights are viewed in their slots, and files looked at
            outputs = model(torch.arange(12)[None], use_cache=True)
            kept = kv_cache_argument(model, outputs)
            sys.setprofile(profile)
            try:
                model(torch.tensor([[token]]), use_cache=True, **kept)
            finally:
                sys.setprofile(None)
    return callers


def step_with(seen=None, **options):
    """The modules of a step of the small trained model, whose experts are all resident. `seen` is called with each
    activation that is called as a module."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="100%", **options))
    for module, _ in sparse_layers(model) if seen else ():
        module.act_fn.register_forward_hook(lambda act_fn, *_: seen(act_fn))
    model.moe_offload.warm({layer.name: [1.0] * layer.num_experts for layer in model.moe_offload.layers})
    model.moe_offload.reset_stats()
    callers = modules_of_step(model, 7)
    assert model.moe_offload.stats().misses == 0
    return callers


THE_WAY = {"hf/few_rows", "hf/model/experts_module.py", "hf/model/paths/one_call.py", "cache/cache.py", "kernels"}

EXPERT_BY_EXPERT = {
    "hf/model/experts_module.py",
    "hf/model/paths/fast.py",
    "compute/forward.py",
    "compute/token_grouping.py",
    "cache/cache.py",
    "cache/visit.py",
    "policies/lru.py",
    "compute/mlp.py",
    "kernels",
}


@compiled
def test_a_step_enters_five_modules_and_the_handle_is_none_of_them():
    callers = step_with(mmap=False)
    assert callers.keys() == THE_WAY
    assert [module for module, froms in callers.items() if len(froms) > 1] == ["kernels"]


@compiled
def test_where_the_activation_is_watched_a_step_goes_expert_by_expert():
    seen = []
    callers = step_with(lambda module: seen.append(module), mmap=False)
    assert callers.keys() == THE_WAY | EXPERT_BY_EXPERT
    assert seen
    assert {module for module, froms in callers.items() if len(froms) > 1} <= {"kernels", *IN_MANY_CALLS}


@compiled
def test_the_picture_of_a_step_has_these_modules_each_under_one_that_calls_it():
    steps = runpy.run_path(str(DRAWING))["steps"]()
    assert sorted(step.module for step in steps) == sorted(THE_WAY)
    callers = step_with(mmap=False)
    assert [step for step in steps if step.caller not in callers[step.module]] == []


@compiled
def test_with_mapped_experts_a_step_also_looks_at_their_files(monkeypatch):
    monkeypatch.setattr(mapped, "LOOK_EVERY", math.inf)
    callers = step_with(mmap=True)
    assert callers.keys() == THE_WAY | {"slots/mapped.py"}
    assert [module for module, froms in callers.items() if len(froms) > 1] == ["kernels"]
