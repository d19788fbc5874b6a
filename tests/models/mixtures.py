"""A small random Llama, LoRA adapters on it as PEFT writes them, and mixtures of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from transformers_moe_offload.models.adapter_moe import AdapterMoeConfig, AdapterMoeForCausalLM
from transformers_moe_offload.models.adapter_moe.routed_layers import AdapterRouter

FFN = ("gate_proj", "up_proj", "down_proj")
TARGETS = [*FFN, "q_proj", "o_proj"]
"""What the adapters of the tests add to, all of them together."""
TOKENS = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(0))


def dense_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_adapter(folder: Path, seed: int, *, rank: int = 4, targets: Sequence[str] = FFN, **options) -> Path:
    """An adapter that changes what the dense model says."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(dense_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def write_three(folder: Path) -> list[Path]:
    """Adapters that differ in rank and in what they add to."""
    return [
        write_adapter(folder / "wide", 1, rank=8),
        write_adapter(folder / "narrow", 2, rank=2, use_rslora=True),
        write_adapter(folder / "all", 3, targets=TARGETS, rank_pattern={"up_proj": 6}),
    ]


def mixture(folders: Sequence[Path], **options) -> AdapterMoeForCausalLM:
    """A model of the dense model and these adapters, with random routers."""
    config = AdapterMoeConfig(
        text_config=dense_model().config.to_dict(), adapters=[folder.name for folder in folders], **options
    )
    config.adapter_folders = [str(folder) for folder in folders]
    model = AdapterMoeForCausalLM(config).eval()
    model.language_model.load_state_dict(dense_model().state_dict(), strict=False)
    model.read_adapters()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, AdapterRouter) and module.scoring != "uniform":
            nn.init.normal_(module.weight)
    return model


def force(model: nn.Module, adapter: int) -> None:
    """Have every router choose one adapter for every token."""

    def forced(tokens):
        index = torch.full((len(tokens), 1), adapter)
        return torch.zeros(len(tokens), 1), torch.ones(len(tokens), 1, dtype=tokens.dtype), index

    for module in model.modules():
        if isinstance(module, AdapterRouter):
            module.forward = forced


def with_peft(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(dense_model(), folder)


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options) -> AdapterMoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options)
