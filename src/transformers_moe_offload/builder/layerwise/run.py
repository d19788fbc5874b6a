"""Run text through a dense model, layer by layer: all batches pass a layer before the next one is read.

Each layer's weights are read once and dropped again, so that a model of any size can be run; `ResidualStream` keeps
what is passed from one layer to the next. The model's own forward does the work, so that masks, positions and kinds
of layers are its own: for layer n it is called with the layers below replaced by the saved output of layer n - 1, and
is left as soon as layer n has answered.
"""

# B windows, T tokens in each, H hidden

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from transformers_moe_offload.builder.layerwise.skeleton import Skeleton
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.host_memory import host_bytes

RAM_BYTES = 256 * 2**20
"""Most that is kept in RAM: 16,384 tokens of 4,096 float32 each. A build promises to stay below 1 GB."""


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


class ResidualStream:
    """Hidden states by batch, in a `with` block: in RAM while they are small, else in a temporary file.

    Each may be replaced by one of the same shape.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, ram_bytes: int = RAM_BYTES) -> None:
        """`shapes` are the batches' (B, T, H)."""
        self._shapes, self._dtype = list(shapes), dtype
        sizes = [batch * length * hidden * dtype.itemsize for batch, length, hidden in shapes]
        self._starts = [0, *accumulate(sizes)]
        self._kept: list[Tensor | None] | None = [None] * len(sizes) if self.nbytes <= ram_bytes else None
        self._file: IO[bytes] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return self._starts[-1]

    def __enter__(self) -> ResidualStream:
        if self._kept is None:
            self._file = tempfile.TemporaryFile(prefix="moe-offload-", buffering=0)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
            except OSError as error:
                self._file.close()
                raise CheckpointError(
                    f"hidden states of the calibration text take {self.nbytes:,} bytes in {tempfile.gettempdir()}: "
                    f"{error.strerror}; free some, set TMPDIR to a folder on another disk, or use less text"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __getitem__(self, batch: int) -> Tensor:
        """(B, T, H) on the CPU."""
        if self._kept is not None:
            kept = self._kept[batch]
            assert kept is not None, f"batch {batch} has not been put in"
            return kept
        raw = torch.empty(self._starts[batch + 1] - self._starts[batch], dtype=torch.uint8)
        assert self._file is not None
        self._file.seek(self._starts[batch])
        left = host_bytes(raw)
        while left and (count := self._file.readinto(left)):  # type: ignore[attr-defined]
            left = left[count:]
        return raw.view(self._dtype).view(self._shapes[batch])

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        """`hidden` (B, T, H), on any device."""
        assert tuple(hidden.shape) == self._shapes[batch], f"{tuple(hidden.shape)} for {self._shapes[batch]}"
        values = hidden.to("cpu", self._dtype)  # sync: device -> host
        if self._kept is not None:
            self._kept[batch] = values
            return
        assert self._file is not None
        self._file.seek(self._starts[batch])
        left = host_bytes(values.contiguous().view(-1).view(torch.uint8))
        while left:
            left = left[self._file.write(left) :]
