"""A dense model on the meta device; one decoder layer at a time has weights.

Buffers (rotary frequencies) are real, as no checkpoint has them. `run.py` decides which layer is read when.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.sources.model_class import fill_buffers, on_meta, put
from transformers_moe_offload.errors import CheckpointError, RecipeError

_LAYER_ON = re.compile(r"\.\d+(\..*)?$")
"""From the number of a decoder layer to the end of a module's path."""


class Skeleton:
    """A dense model with room for one decoder layer.

    `paths` are paths of modules inside decoder layers, from which the list of layers is found.
    """

    def __init__(self, source: Source, paths: list[str], dtype: torch.dtype, device: str) -> None:
        self._source, self._dtype, self._device = source, dtype, device
        try:
            self.causal: PreTrainedModel = on_meta(source.config, dtype)
            """The model with its head, without weights."""
        except ValueError as error:  # raised by Auto classes for an unknown type
            raise RecipeError(f"{source.name} is no causal language model: {error}") from error
        fill_buffers(self.causal, device)
        self.stack, *others = {_LAYER_ON.sub("", path) for path in paths}
        """Path of the list of decoder layers."""
        assert not others, f"modules of several stacks: {paths}"
        found = self.causal.get_submodule(self.stack)
        assert isinstance(found, nn.ModuleList), f"{self.stack} is a {type(found).__name__}"
        self.decoder_layers = found

    def embedded(self, tokens: list[Tensor]) -> Iterator[Tensor]:
        """Token embeddings: tokens (B, T) int64 -> (B, T, H)."""
        embeddings = self.causal.get_input_embeddings()
        path = next(name for name, module in self.causal.named_modules() if module is embeddings)
        # Rows are looked up as they are stored: converting the table would take memory for a second one.
        table = self._source.read(_stored(self._source, f"{path}.weight"))
        for batch in tokens:
            yield nn.functional.embedding(batch, table).to(self._dtype)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer, with its weights while the block lasts."""
        module = self.decoder_layers[index]
        placeholders = dict(module.named_parameters())
        try:
            for name, placeholder in placeholders.items():
                put(module, name, self._weight(index, name, placeholder))
            yield module
        finally:
            for name, placeholder in placeholders.items():
                put(module, name, placeholder)

    def _weight(self, index: int, name: str, placeholder: Tensor) -> Tensor:
        full = _stored(self._source, f"{self.stack}.{index}.{name}")
        weight = self._source.read(full)
        if weight.shape != placeholder.shape:
            raise CheckpointError(
                f"{self._source.name} stores {full} as {list(weight.shape)}, but by its config it is "
                f"{list(placeholder.shape)}; one of the two is of another model"
            )
        return weight.to(self._device, placeholder.dtype)  # copy: host -> device


def layer_path(layer: int, path: str) -> str:
    """The decoder layer that a module is in: `model.layers.3` for `model.layers.3.mlp`."""
    return path[: path.index(f".{layer}.")] + f".{layer}"


def _stored(source: Source, name: str) -> str:
    if name not in source.tensors:
        raise CheckpointError(f"{source.name} has no tensor {name}, which its config calls for; is it complete?")
    return name
