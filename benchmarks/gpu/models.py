"""Models with the shapes of published ones, as prebuilt checkpoints of random weights; the model is never built.

Sizes are those of the models' own `config.json`. Every matrix of n inputs has weights of spread `GAIN / sqrt(n)`: so
the token's own embedding, whose entries spread by 1, stays most of the residual stream through dozens of layers, and
routing is as local as `POPULARITY` makes it.
"""

# E experts, H hidden

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import transformers
from torch import Tensor

from benchmarks.harness.make_model import BIAS
from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.hf.loading.discover import take_over
from transformers_moe_offload.hf.prebuilt.layout import MARKS, LayerContent, plain_config, prebuilt_config
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.output.claim import is_complete
from transformers_moe_offload.output.shards import Advance, Content
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.tensor_files.writer import as_json

POPULARITY = 0.7
"""Spread of a bias of the routers' logits over that of the logits themselves: see `Shape.popularity` in `shape.py`,
which says what hit rates it gives and of which model they are those."""

LOCALITY = "31 % of a token's experts were the last one's (30 % by popularity alone), 35 % (30 %) of tiny-moe's on text"
"""Of OLMoE's routing drawn so, over 500 tokens and all layers, and of the trained model of this repository, which has
16 experts a layer where OLMoE has 64. Drawn routing repeats itself hardly more than popularity makes it."""

GAIN = 0.64
"""That of a matrix of 1024 inputs with Transformers' spread of 0.02, for which `POPULARITY` was found."""

HEADROOM = 0.75
"""Of RAM and of the disk's free space, what all experts of a model may take."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: its config class, and what differs from the class's defaults."""

    config_class: str
    sizes: dict[str, Any] = field(default_factory=dict)
    group_size: int = 64

    def config(self, layers: int | None = None) -> Any:
        """Its config; with so many layers, if a number is given."""
        fewer = {} if layers is None else {"num_hidden_layers": layers}
        nobody = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # a run must not end early
        made = getattr(transformers, self.config_class)(**self.sizes | fewer | nobody)
        made.architectures = [self.config_class.replace("Config", "ForCausalLM")]
        made.dtype = "bfloat16"
        return made


PUBLISHED = {
    "Mixtral-8x7B": Published(
        config_class="MixtralConfig",
        sizes={
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32_768,
            "sliding_window": None,
        },
    ),
    "Qwen3-30B-A3B": Published(
        config_class="Qwen3MoeConfig",
        sizes={
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40_960,
        },
    ),
    "gpt-oss-20b": Published(
        config_class="GptOssConfig",
        sizes={
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
    ),
    "OLMoE-1B-7B": Published(
        config_class="OlmoeConfig",
        sizes={
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
        },
    ),
}

QUICK = {
    "tiny gpt-oss": Published(
        config_class="GptOssConfig",
        sizes={
            "vocab_size": 256,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
        group_size=16,
    ),
}
"""Small enough to run through every line in seconds; transposed matrices, biases, and a clamped gate."""


def blueprint(published: Published, nbits: int, layers: int | None = None) -> tuple[Quantization, OffloadConfig]:
    """A model on meta and how it is quantized: experts in so many bits, attention in 4."""
    format = HqqFormat(nbits=nbits, group_size=published.group_size, optimize=False)
    config = OffloadConfig(experts=format, dense=replace(format, nbits=4))
    model_config = published.config(layers)
    model_class = getattr(transformers, model_config.architectures[0])
    with torch.device("meta"):
        model = model_class._from_config(model_config, dtype=torch.bfloat16)
    take_over(model)
    return Quantization.of(model, config, torch.bfloat16), config


def layers_that_fit(published: Published, nbits: int, ram_bytes: int, disk_bytes: int) -> int:
    """How many of its layers a machine can hold in RAM and on its disk."""
    all_layers = published.config().num_hidden_layers
    sizes = Sizes.of(blueprint(published, nbits, layers=1)[0])
    room = int(HEADROOM * min(ram_bytes, disk_bytes - sizes.dense_bytes))
    return max(1, min(all_layers, room // sizes.expert_bytes))


def make(folder: Path, published: Published, nbits: int, layers: int, device: torch.device, advance: Advance) -> None:
    """Write the checkpoint, or what is missing of it."""
    if is_complete(folder, MARKS):
        return
    quantization, config = blueprint(published, nbits, layers)
    recipe = {"published": published.config(layers).to_dict(), "popularity": POPULARITY} | config.recipe()
    content = Prebuilt(
        [
            LayerContent.coded(
                layer.name,
                layer.num_experts,
                codecs,
                partial(_record, codecs.usual, layer.name, device),
            )
            for layer, codecs in zip(quantization.layers, quantization.codecs, strict=True)
        ],
        _dense_contents(quantization, device),
        texts={"config.json": as_json(prebuilt_config(_plain(quantization), config.recipe()))},
    )
    write_prebuilt(folder, content, json.loads(json.dumps(recipe, default=str)), advance=advance)


def _plain(quantization: Quantization) -> dict[str, Any]:
    return plain_config(quantization.model, torch.bfloat16)


@torch.no_grad()
def _record(codec: ExpertCodec, layer: str, device: torch.device, expert: int) -> Tensor:
    """One expert, drawn and quantized on the device: its record, uint8."""
    random = _generator(f"{layer}.{expert}", device)
    tensors = {}
    for one in codec.fields:
        fan_in = one.shape[0 if codec.is_transposed else -1]
        drawn = _drawn(one.shape, GAIN / fan_in**0.5, random) if len(one.shape) == 2 else _zeros(one.shape, device)
        tensors[one.name] = drawn.to(torch_dtype(one.dtype))
    layout = RecordLayout(codec.stored)
    row = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    views = layout.views(row)
    for name, part in codec.encode(tensors, f"expert {expert} of {layer}").items():
        views[name].copy_(part)
    return row.cpu()  # sync: device -> host


def _dense_contents(quantization: Quantization, device: torch.device) -> list[Content]:
    """All tensors but the experts', in the order of the model."""
    model, parameters = quantization.model, quantization.checkpoint.parameters
    embedding = model.get_input_embeddings().weight
    embeddings = {name for name, one in model.named_parameters(remove_duplicate=False) if one is embedding}
    routers = {layer.name.rpartition(".")[0]: layer.num_experts for layer in quantization.layers}

    def draw(name: str) -> dict[str, Tensor]:
        shape = tuple(parameters[name].shape)
        random = _generator(name, device)
        if len(shape) < 2:
            tensor = torch.ones(shape, device=device) if "norm" in name else _zeros(shape, device)
        elif name in embeddings:
            tensor = _drawn(shape, 1.0, random)
            tensor[:, BIAS] = 1.0
        else:
            tensor = _drawn(shape, GAIN / shape[-1] ** 0.5, random)
            parent = name.rpartition(".")[0].rpartition(".")[0]
            if routers.get(parent) == shape[0]:  # (E, H)
                tensor[:, BIAS] = _drawn((shape[0],), POPULARITY * GAIN, random)
        encoded = quantization.encode(name, tensor.to(quantization.checkpoint.dtype_of(name)))
        return {part: array.cpu() for part, array in encoded.items()}  # sync: device -> host

    return [Content(quantization.parts_of(name), partial(draw, name)) for name in quantization.saved_names()]


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(crc32(name.encode()))


def _drawn(shape: tuple[int, ...], std: float, random: torch.Generator) -> Tensor:
    return torch.empty(shape, device=random.device).normal_(std=std, generator=random)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device)
