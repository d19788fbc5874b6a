"""Make a dense model with random weights and a mixture of random adapters on it, once."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from transformers import LlamaConfig

from transformers_moe_offload.models.adapter_moe import AdapterMoeConfig, AdapterMoeForCausalLM
from transformers_moe_offload.models.adapter_moe.adapter_folders import CONFIG_NAME, FOLDER, WEIGHTS_NAME, key

TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class MixtureShape:
    """A Llama, and LoRA adapters on its feed-forward blocks."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 8
    rank: int = 8
    vocab: int = 8192
    adapters_per_token: int = 2

    def config(self, num_adapters: int) -> AdapterMoeConfig:
        """Of a mixture of so many."""
        dense = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 256 or 1,
            vocab_size=self.vocab,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,  # a run must not end early
        )
        return AdapterMoeConfig(
            text_config=dense.to_dict(),
            adapters=[f"adapter-{number:04}" for number in range(num_adapters)],
            target_modules=TARGETS,
            rank=self.rank,
            num_experts_per_tok=self.adapters_per_token,
            dtype="bfloat16",
        )


SMALL = MixtureShape(hidden=64, intermediate=96, layers=2, vocab=256)


def made_mixture(shape: MixtureShape, num_adapters: int, parent: Path) -> Path:
    """The folder of a mixture of so many adapters; makes it if it is not there."""
    folder = parent / f"adapters-{num_adapters}-of-{'-'.join(str(size) for size in asdict(shape).values())}"
    if (folder / "config.json").exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    config = shape.config(num_adapters)
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        meta = AdapterMoeForCausalLM(config)
    dense = {
        name: torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.dim() == 1
        else torch.empty(tensor.shape).normal_(std=0.02, generator=random).to(torch.bfloat16)
        for name, tensor in meta.state_dict().items()
        if ".experts." not in name and not name.endswith("lm_head.weight")
    }
    unfinished.mkdir(parents=True)
    save_file(dense, unfinished / "model.safetensors", metadata={"format": "pt"})
    linears = {
        f"model.layers.{layer}.mlp.{name}": (shape.hidden, shape.intermediate)[:: -1 if name == "down_proj" else 1]
        for layer in range(shape.layers)
        for name in TARGETS
    }
    for name in track(config.adapters, "making adapters"):
        at = unfinished / FOLDER / name
        at.mkdir(parents=True)
        tensors = {}
        for path, (size_in, size_out) in linears.items():
            for matrix, size in (("A", (shape.rank, size_in)), ("B", (size_out, shape.rank))):
                tensors[key(path, matrix)] = torch.empty(size).normal_(std=0.02, generator=random).to(torch.bfloat16)
        save_file(tensors, at / WEIGHTS_NAME, metadata={"format": "pt"})
        said = {"peft_type": "LORA", "r": shape.rank, "lora_alpha": 2 * shape.rank, "target_modules": list(TARGETS)}
        (at / CONFIG_NAME).write_text(json.dumps(said))
    config.architectures = ["AdapterMoeForCausalLM"]
    config.save_pretrained(unfinished)
    os.sync()
    return unfinished.rename(folder)
