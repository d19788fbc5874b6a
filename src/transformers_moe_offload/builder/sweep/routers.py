"""The routers of a loaded mixture: their rows can be replaced, and their choices counted."""

# N tokens, E experts, H hidden

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.builder.gates.rows import Scores, entropy
from transformers_moe_offload.errors import RecipeError


class Routers:
    """By layer the module whose `weight`, (E, H), scores the experts."""

    def __init__(self, model: nn.Module, parameters: Mapping[int, str], scores: Scores) -> None:
        """`parameters` are the weights' names in the model, by layer."""
        self._model, self._scores = model, scores
        self._paths = {layer: name.removesuffix(".weight") for layer, name in parameters.items()}
        self._modules = {layer: model.get_submodule(path) for layer, path in self._paths.items()}

    @torch.no_grad()
    def set_rows(self, rows: Mapping[int, Tensor]) -> None:
        """Give every router its rows, (E, H)."""
        for layer, module in self._modules.items():
            weight = module.get_parameter("weight")
            if weight.shape != rows[layer].shape:
                raise RecipeError(
                    f"the router of layer {layer} has rows {list(weight.shape)}, but the gate gives "
                    f"{list(rows[layer].shape)}; is it of another mixture?"
                )
            weight.copy_(rows[layer])

    @contextmanager
    def choosing(self, experts_per_token: int) -> Iterator[None]:
        """Have every token take this many experts while the block lasts."""
        with ExitStack() as undone:
            for owner in [owner for layer in self._paths for owner in self._owners_of_top_k(layer)]:
                undone.callback(setattr, owner, "top_k", owner.top_k)
                owner.top_k = experts_per_token
            yield

    def _owners_of_top_k(self, layer: int) -> list[Any]:
        path = self._paths[layer]
        owners = [self._model.get_submodule(path[:end]) for end, letter in enumerate(path + ".") if letter == "."]
        found = [owner for owner in owners if isinstance(getattr(owner, "top_k", None), int)]
        if not found:
            raise RecipeError(f"{path} has no top_k that could be changed; leave gateless out of the sweep")
        return found

    @contextmanager
    def counting(self, home: int | None) -> Iterator[Counts]:
        """Count the routers' choices; `home` is the expert that the tokens belong to, if any."""
        counts = Counts(self._scores, home)
        with ExitStack() as undone:
            for layer, module in self._modules.items():
                undone.enter_context(module.register_forward_pre_hook(counts.hook(layer), with_kwargs=True))
            yield counts


class Counts:
    """Sums over the tokens that routers have seen, by layer."""

    def __init__(self, scores: Scores, home: int | None) -> None:
        self._scores, self._home = scores, home
        self._tokens: dict[int, int] = defaultdict(int)
        self._at_home: dict[int, int] = defaultdict(int)
        self._entropy: dict[int, float] = defaultdict(float)

    def hook(self, layer: int) -> Callable[..., None]:
        """A hook that counts a router's choices from its input."""

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            weight = module.get_parameter("weight").float()
            logits = hidden.reshape(-1, weight.shape[1]).float() @ weight.T
            self._tokens[layer] += len(logits)
            self._entropy[layer] += entropy(logits, self._scores).sum().item()
            if self._home is not None:
                self._at_home[layer] += int((logits.argmax(-1) == self._home).sum())

        return look

    @property
    def sent_home(self) -> dict[int, float] | None:
        """Share of tokens whose first choice is their own expert, by layer."""
        if self._home is None:
            return None
        return {layer: self._at_home[layer] / count for layer, count in self._tokens.items()}

    @property
    def entropies(self) -> dict[int, float]:
        """Mean entropy of the routing weights, by layer."""
        return {layer: self._entropy[layer] / count for layer, count in self._tokens.items()}
