"""Run the experts' texts through the base model, and hand on each layer's statistics once they have passed it; or read
their embeddings alone, without a pass."""

# B windows, T tokens in each, H hidden, N sampled tokens, E experts

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.builder.gates.rows import Sums, directions, sample
from transformers_moe_offload.builder.layerwise.run import run
from transformers_moe_offload.builder.layerwise.skeleton import Skeleton, layer_path
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.windows import Windows


@dataclass(frozen=True)
class Seen:
    """Statistics of one layer."""

    sums: Mapping[str, Sums]
    """By the place where hidden states were read: `router_input`, `layer_input`."""
    sample: Tensor
    """(N, H) bfloat16: the router's input for some of the tokens, whatever the place."""
    home: Tensor
    """(N,) int64: the expert whose texts each of these tokens is from."""


def calibrate(
    windows: Windows,
    base: Source,
    ffn: Mapping[int, str],
    sites: Mapping[str, bool],
    take: Callable[[int, Seen], None],
    *,
    device: str,
    advance: Callable[[int], None] | None,
) -> None:
    """Call `take` with each layer of `ffn` and its statistics, lowest first.

    `sites` maps the places that are wanted (see `Seen.sums`) to whether their second moment is wanted. A router's input
    is that of the dense model's feed-forward block: the residual stream after attention, and through the norm.
    """
    watched = {layer: [layer_path(layer, block), block] for layer, block in sorted(ffn.items())}
    run(base, windows.batches, watched, _Taker(windows, ffn, sites, take), device=device, advance=advance)


def embedding_rows(windows: Windows, base: Source, ffn_path: str, *, center: bool) -> Tensor:
    """The same rows for every layer, (E, H) float64 of length 1, from token embeddings alone.

    The mean embedding of an expert's texts, less that of its negative prompts.
    """
    model = Skeleton(base, [ffn_path], torch.float32, "cpu")
    sums = torch.zeros(0)
    for batch, embedded in zip(windows.batches, model.embedded([b.tokens for b in windows.batches]), strict=True):
        if not len(sums):
            sums = torch.zeros(len(windows.counts), embedded.shape[-1], dtype=torch.float64)
        kept = torch.where(batch.counted[..., None], embedded, 0).sum(1, dtype=torch.float64)
        sums.index_add_(0, batch.lists, kept)
    mean = sums / torch.tensor(windows.counts, dtype=torch.float64).clamp(min=1)[:, None]
    return directions(mean[::2] - mean[1::2], center)


class _Taker:
    """Sums of the current layer; those of the layer before are dropped."""

    def __init__(
        self, windows: Windows, ffn: Mapping[int, str], sites: Mapping[str, bool], take: Callable[[int, Seen], None]
    ) -> None:
        self._windows, self._ffn, self._sites, self._take = windows, ffn, sites, take
        self._begin()

    def seen(self, layer: int, path: str, batch: int, hidden: Tensor) -> None:
        windows, hidden = self._windows.batches[batch], hidden.to("cpu", torch.float32)  # sync: device -> host
        site = "router_input" if path == self._ffn[layer] else "layer_input"
        if site in self._sites:
            if site not in self._sums:
                counts, second_moment = self._windows.counts, self._sites[site]
                self._sums[site] = Sums(counts, hidden.shape[-1], second_moment=second_moment)
            self._sums[site].add(windows, hidden)
        if site == "router_input":
            self._samples.append(sample(windows, hidden))

    def passed(self, layer: int) -> None:
        samples, homes = zip(*self._samples, strict=True)
        self._take(layer, Seen(self._sums, torch.cat(samples), torch.cat(homes)))
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._samples: list[tuple[Tensor, Tensor]] = []
