"""Run text through a dense model, layer by layer: all batches pass a layer before the next one is read.

Each layer's weights are read once and dropped again, so that a model of any size can be run; `residual_stream.py` keeps
what is passed from one layer to the next. The model's own forward does the work, so that masks, positions and kinds
of layers are its own: for layer n it is called with the layers below replaced by the saved output of layer n - 1, and
is left as soon as layer n has answered.
"""

# B windows, T tokens in each, H hidden

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from transformers_moe_offload.builder.layerwise.residual_stream import ResidualStream
from transformers_moe_offload.builder.layerwise.skeleton import Skeleton
from transformers_moe_offload.builder.sources.base import Source


class Windows(Protocol):
    """Token windows that go through the model together."""

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64."""

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, T) int64, or None where pads, if there are any, come last: later tokens change no hidden state."""


class Watcher(Protocol):
    """Receives hidden states as they pass."""

    def seen(self, layer: int, path: str, batch: int, hidden: Tensor) -> None:
        """The input of a watched module: (B, T, H)."""

    def passed(self, layer: int) -> None:
        """All batches have passed this layer."""


class _AnsweredError(Exception):
    """Leaves the model's forward with a layer's output; always caught in this file."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def run(
    source: Source,
    batches: Sequence[Windows],
    watched: Mapping[int, Sequence[str]],
    watcher: Watcher,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> None:
    """Show a watcher the inputs of some modules.

    `watched` has module paths by decoder layer; layers above the last of them are not read. `advance` is called with 1
    after each layer; without it there is a progress bar like those of Transformers.
    """
    if not watched or not batches:
        return
    model = Skeleton(source, [path for paths in watched.values() for path in paths], dtype, device)
    num_layers = max(watched) + 1
    hidden_size = model.causal.get_input_embeddings().weight.shape[1]
    shapes = [(*batch.tokens.shape, hidden_size) for batch in batches]
    with (
        ResidualStream(shapes, dtype) as stream,
        tqdm(total=num_layers, unit="layer", desc="Calibrating", disable=advance is not None) as bar,
    ):
        for number, embedded in enumerate(model.embedded([batch.tokens for batch in batches])):
            stream[number] = embedded
        for index in range(num_layers):
            paths = watched.get(index, ())
            with model.layer(index):
                for number, batch in enumerate(batches):
                    hidden = stream[number].to(device)  # copy: host -> device
                    watchers = {path: partial(watcher.seen, index, path, number) for path in paths}
                    stream[number] = _answer(model, index, batch, hidden, watchers)
            if paths:
                watcher.passed(index)
            (advance or bar.update)(1)


def _answer(
    model: Skeleton, index: int, batch: Windows, hidden: Tensor, watchers: Mapping[str, Callable[[Tensor], None]]
) -> Tensor:
    """A layer's output for one batch; the layers below answer with the residual stream, without computing."""

    def leave(_: nn.Module, __: Any, answer: Any) -> None:
        raise _AnsweredError(answer[0] if isinstance(answer, tuple) else answer)

    def watch(seen: Callable[[Tensor], None], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(args[0] if args else next(iter(kwargs.values())))

    mask = batch.attention_mask
    with ExitStack() as undone:
        for below in list(model.decoder_layers)[:index]:
            below.forward = lambda *_, **__: hidden
            undone.callback(delattr, below, "forward")
        for path, seen in watchers.items():
            module = model.causal.get_submodule(path)
            undone.enter_context(module.register_forward_pre_hook(partial(watch, seen), with_kwargs=True))
        undone.enter_context(model.decoder_layers[index].register_forward_hook(leave))
        try:
            model.causal(
                inputs_embeds=hidden,
                attention_mask=mask if mask is None else mask.to(hidden.device),
                use_cache=False,
            )
        except _AnsweredError as answered:
            return answered.hidden
    raise AssertionError("the model has not called its own layer")
