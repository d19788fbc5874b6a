"""What accelerate does with a mixture that does not fit into a GPU: whole layers of bfloat16 experts, handed over one
layer after the other.

The model has the published shapes and constant weights, which is all the same to accelerate: it moves every expert of
a layer whoever is asked for. Where not all layers fit into RAM there are fewer, and times are for as many as there are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList

from transformers_moe_offload.bench.clock import StepClock, laid_down
from transformers_moe_offload.bench.passage import random_passage
from transformers_moe_offload.hf.loading.discover import find_experts

IMPLEMENTATION = "grouped_mm"
"""Of Transformers' experts; the one that stock models take by default."""

WEIGHT = 2.0**-7

RAM_SHARE = 0.8
"""Of the RAM that is free."""


def measure_accelerate(folder: str, prompt_tokens: int, steps: int, prefills: list[int], runs: int) -> dict[str, Any]:
    """Seconds of decode steps and of prompts, and how many of the layers they are for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = _plain_config(Path(folder))
    all_layers = config.num_hidden_layers
    config.num_hidden_layers = min(all_layers, _layers_in_ram(config))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = _offloaded(config, device)
    tokens = random_passage(config.vocab_size).sequences(1, max([prompt_tokens + steps + 1, *prefills]) + 1)

    def seconds(prompt: int, following: int) -> list[float]:
        clock = StepClock(laid_down(tokens[:, prompt:]))
        with torch.inference_mode():
            clock.start()
            model.generate(
                tokens[:, :prompt].to(device),
                attention_mask=torch.ones(1, prompt, dtype=torch.int64, device=device),
                max_new_tokens=following + 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
                pad_token_id=0,
            )
        return clock.step_s if following else [clock.first_s]

    seconds(prompt_tokens, 1)
    started = time.perf_counter()
    answer = {
        "layers": config.num_hidden_layers,
        "all_layers": all_layers,
        "decode": [{"forward_s": seconds(prompt_tokens, steps)} for _ in range(runs)],
        "prefill": {str(length): [{"forward_s": seconds(length, 0)}] for length in prefills},
    }
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return answer | {
        "elapsed_s": time.perf_counter() - started,
        "memory": {"gpu_bytes": peak, "pinned_bytes": 0 if peak is not None else None},
    }


def _plain_config(folder: Path) -> Any:
    """The config of the published model, which nobody has quantized."""
    stored = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "auto_map"):
        stored.pop(key, None)
    return AutoConfig.for_model(**stored)


def _layers_in_ram(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    of_layer = max(sum(p.nbytes for p in module.parameters()) for _, module, _ in find_experts(model))
    return max(1, int(RAM_SHARE * psutil.virtual_memory().available) // of_layer)


def _offloaded(config: Any, device: torch.device) -> Any:
    """A model whose experts modules accelerate keeps in RAM; the rest is on the device."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation=IMPLEMENTATION)
    modules = [module for _, module, _ in find_experts(model)]
    in_experts = {id(parameter) for module in modules for parameter in module.parameters()}
    for name, parameter in list(model.named_parameters()):
        place = "cpu" if id(parameter) in in_experts else device
        set_module_tensor_to_device(model, name, place, value=_constant(parameter, "norm" in name))
    for module in model.modules():
        _move_buffers(module, device)
    model.tie_weights()
    for module in modules:
        cpu_offload(module, execution_device=device)
    return model.eval()


def _constant(parameter: Tensor, is_norm: bool) -> Tensor:
    return torch.full(parameter.shape, 1.0 if is_norm else WEIGHT, dtype=parameter.dtype)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
