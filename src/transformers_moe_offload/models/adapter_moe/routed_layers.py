"""The layers of a mixture of adapters: linear layers that add the outputs of chosen adapters, and their routers.

Modules of the dense model keep their place, name and weights; their class is swapped for one that routes.
"""

# N tokens, K adapters per token, E adapters, H hidden, R rank

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_adapter_moe import AdapterMoeConfig, AdapterMoeError


class Choice(NamedTuple):
    """Which adapters each token takes."""

    adapters: Tensor
    """(N, K) int64."""
    weights: Tensor
    """(N, K), in the dtype of the hidden states."""


_chosen: ContextVar[Choice | None] = ContextVar("_chosen", default=None)
"""The choice that linear layers without a router of their own follow."""


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """Let the linear layers that are called inside the block follow a choice."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


class AdapterRouter(nn.Module):
    """Scores the adapters for each token, and takes the best."""

    def __init__(self, config: AdapterMoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.scoring = config.scoring
        self.temperature = config.temperature
        self.only: int | None = None
        """The adapter that is chosen whatever the scores."""
        if self.scoring != "uniform":
            self.weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states (N, H) -> logits (N, E) float32, weights (N, K) and index (N, K) int64, best first."""
        if self.scoring == "uniform":
            logits = torch.zeros(len(hidden_states), self.num_experts, device=hidden_states.device)
        else:
            logits = nn.functional.linear(hidden_states, self.weight).float() / self.temperature
        if self.scoring == "arrow":
            logits = logits.abs()  # the sign of a singular vector says nothing
        if self.only is not None:
            index = torch.full((len(hidden_states), 1), self.only, device=hidden_states.device)
            return logits, torch.ones_like(hidden_states[:, :1]), index
        best, index = logits.topk(self.top_k, dim=-1)
        weights = best.sigmoid() if self.scoring == "sigmoid" else best.softmax(dim=-1)
        return logits, weights.to(hidden_states.dtype), index

    def choose(self, hidden_states: Tensor) -> Choice:
        """The same as a choice."""
        _, weights, index = self(hidden_states)
        return Choice(index, weights)


class LoraExperts(nn.Module):
    """What every adapter adds to one linear layer: all of them stacked, padded with zeros to one rank."""

    def __init__(self, config: AdapterMoeConfig, path: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.num_experts, config.rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(config.num_experts, out_features, config.rank))
        self.out_features = out_features
        self.path = path
        self.top_k = config.num_experts_per_tok
        """The linear layer's in the dense model: what the adapters' files call it."""
        self.folders = tuple(config.adapter_folders)
        """Where the adapters are, if the model is read from files."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (N, in), top_k_index (N, K) int64, top_k_weights (N, K) -> (N, out)."""
        out = hidden_states.new_zeros(len(hidden_states), self.out_features)
        for expert in top_k_index.unique().tolist():  # sync: device -> host
            token, slot = torch.where(top_k_index == expert)
            lora_a, lora_b = self.lora_A[expert], self.lora_B[expert]
            delta = hidden_states[token].to(lora_a.dtype) @ lora_a.T @ lora_b.T
            out.index_add_(0, token, (delta * top_k_weights[token, slot, None]).to(out.dtype))
        return out


class RoutedLinear(nn.Linear):
    """A linear layer, and what the chosen adapters add to it."""

    router: AdapterRouter
    """Its own, if it has one."""
    experts: LoraExperts
    adapter_scaling: Tensor
    """(E,): LoRA's alpha over rank, of each adapter."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., in) -> (..., out)."""
        out = super().forward(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        choice = self.router.choose(rows) if "router" in self._modules else _chosen.get()
        if choice is None:
            raise AdapterMoeError(
                f"no adapters are chosen for {self.experts.path}: its router is called by the model's forward, which "
                f"this call did not go through (with router_per='model', gradient checkpointing does that)"
            )
        weights = choice.weights * self.adapter_scaling[choice.adapters].to(choice.weights.dtype)
        return out + self.experts(rows, choice.adapters, weights).view(out.shape)


class RoutedBlock(nn.Module):
    """A feed-forward block that is computed once for each adapter a token takes; the results are summed by weight."""

    router: AdapterRouter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., H) -> (..., H)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights = self.router.choose(tokens)
        rows = tokens.repeat_interleave(index.shape[1], dim=0)
        with choosing(Choice(index.reshape(-1, 1), torch.ones_like(rows[:, :1]))):
            out = super().forward(rows.unsqueeze(0))
        out = out.view(*index.shape, -1) * weights.unsqueeze(-1)
        return out.sum(dim=1).view(hidden_states.shape)


def add_adapters(model: nn.Module, config: AdapterMoeConfig) -> None:
    """Let the linear layers that the config names be routed; raises `AdapterMoeError` if a dense model has none."""
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_target(path, config.target_modules)
    }
    if not linears:
        raise AdapterMoeError(
            f"the dense model has no linear layer whose path ends with one of {config.target_modules}"
        )
    for path, linear in linears.items():
        block = model.get_submodule(path.rpartition(".")[0])
        has_block = config.router_per == "ffn" and takes_one_input(block)
        if has_block and not isinstance(block, RoutedBlock):
            block.router = AdapterRouter(config, linear.in_features)  # the first linear layer reads the block's input
            plain: Any = type(block)
            block.__class__ = _routed_block(plain)
        elif config.router_per != "model" and not has_block:
            linear.router = AdapterRouter(config, linear.in_features)
        linear.experts = LoraExperts(config, path, linear.in_features, linear.out_features)
        scaling = torch.ones(config.num_experts, dtype=torch.float32)
        linear.register_buffer("adapter_scaling", scaling, persistent=False)  # the adapters' configs know it
        linear.__class__ = RoutedLinear


def is_target(path: str, targets: Sequence[str]) -> bool:
    """Whether a path is one of the targets or ends with one, as PEFT has it."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def takes_one_input(block: nn.Module) -> bool:
    """Whether a block is called with hidden states and nothing else, as feed-forward blocks are."""
    return len(inspect.signature(type(block).forward).parameters) == 2


@cache
def _routed_block(plain: Any) -> Any:
    return type(f"Routed{plain.__name__}", (RoutedBlock, plain), {})
