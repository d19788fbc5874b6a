"""Dense checkpoints and recipes that the builder's tests share."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from transformers_moe_offload.builder import MoeRecipe
from transformers_moe_offload.builder.recipe import Expert, Gate, Origin

NUM_LAYERS = 8

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip

WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}

FIELDS = {
    "mistral": {"sliding_window": 4},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "cohere2": {"sliding_window": 4},
    "granite": {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 3.0,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)},
    "qwen3_5_text": {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
}  # fmt: skip


def dense_model(family: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A small random model, initialised as its class does it, biases and norms too."""
    config = CONFIG_MAPPING[family](**{**SIZES, **FIELDS.get(family, {}), **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # else biases would be zero and norms one, and a test would not miss them
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def save_dense(folder: Path, family: str = "llama", seed: int = 0, **fields) -> Path:
    """The same in a folder, with files beside the weights that have to come along."""
    dense_model(family, seed, **fields).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "tokenizer_config.json").write_text('{"padding_side":   "left"}')
    return folder


def recipe_of(base: Path, *others: Path, **options) -> MoeRecipe:
    """Experts from these models, routed at random; with none given, two copies of the base model."""
    experts = [Expert(source=Origin(model=str(folder))) for folder in others] or [Expert(), Expert()]
    options = {"gate": Gate(mode="noise"), "experts_per_token": min(2, len(experts)), **options}
    return MoeRecipe(base_model=Origin(model=str(base)), **{"experts": experts, **options})
