"""Tiny random dense models of every family that can become the experts of a mixture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.expert import FieldSpec
from zoo.weights import randomise

FFN = {"lfm2": "feed_forward"}
"""What families call the feed-forward block, where it is not `mlp`."""

FIELDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "mistral": {"sliding_window": 4},
}
FAMILIES = (
    "llama", "mistral", "qwen2", "seed_oss", "qwen3", "olmo2", "granite", "ernie4_5", "hunyuan_v1_dense", "cohere2",
    "lfm2", "qwen3_5_text",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A dense model in memory as a source of tensors; the real one reads them from files."""

    model: PreTrainedModel
    name: str = "model-in-memory"
    revision: str | None = None
    companions: tuple[Path, ...] = ()
    card: Path | None = None

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        return (Ancestor(self.name, self.revision),)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def tensors(self) -> Mapping[str, FieldSpec]:
        state = self.model.state_dict()
        return {name: FieldSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in state.items()}

    def read(self, name: str) -> Tensor:
        return self.model.state_dict()[name].clone()


def dense_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **fields) -> PreTrainedModel:
    """A model with 4 layers of hidden size 32 whose weights are all drawn from `seed`."""
    config = CONFIG_MAPPING[family](
        **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": 2, **FIELDS.get(family, {}), **fields,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed)
    return model.eval()


def ffn_paths(family: str = "llama", num_layers: int = 4) -> dict[int, str]:
    """The module path of each layer's feed-forward block."""
    return {layer: f"model.layers.{layer}.{FFN.get(family, 'mlp')}" for layer in range(num_layers)}
