"""The rows of routers: from sums over a layer's hidden states, or drawn; and their scale. Pure; no model, no file.

A router's softmax is as sharp as its rows are long. Their length says nothing by itself (hidden states differ in size
from layer to layer and from model to model), so it is calibrated: routing weights over all experts are to have a given
entropy on the texts of the experts.

Memory does not depend on how much text there is: O(H^2) where the second moment is wanted, O(E H) else.
"""

# B windows, T tokens in each, H hidden, E experts, N sampled tokens, L layers

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.builder.texts.windows import Batch
from transformers_moe_offload.errors import RecipeError

READ = ("ridge", "mean", "hidden", "hidden_avg", "base_first")
"""Modes that need hidden states."""

NEED_SECOND_MOMENT = ("ridge", "base_first")
"""Modes that need the mean product of each two channels over all tokens of the text."""

Scores = Literal["softmax", "sigmoid"]
"""How routers turn logits into scores; weights are the scores divided by their sum."""

_OCTAVES = (-20, 40)
"""Scales that are tried, as powers of 2; the first of them makes any gate flat."""

SAMPLE_DTYPE = torch.bfloat16
"""The sample is rounded when it is taken, so that a file of statistics holds what was used."""


class Sums:
    """Sums over the hidden states at one place of one layer.

    Lists of texts are numbered as in `Batch.lists`; each list weighs the same, whatever its length.
    """

    def __init__(self, counts: Sequence[int], hidden_size: int, *, second_moment: bool) -> None:
        self.counts = torch.tensor(counts, dtype=torch.float64)
        """(2 E,): tokens by list."""
        self.tokens = torch.zeros(len(counts), hidden_size, dtype=torch.float64)
        """(2 E, H): sum over tokens."""
        self.last = torch.zeros_like(self.tokens)
        """(2 E, H): sum over windows of the last token."""
        self.window_means = torch.zeros_like(self.tokens)
        """(2 E, H): sum over windows of the mean over tokens."""
        self.windows = torch.zeros(len(counts), dtype=torch.float64)
        """(2 E,): windows by list."""
        self.second_moment = torch.zeros(hidden_size, hidden_size, dtype=torch.float64) if second_moment else None
        """(H, H): sum over lists of the mean of x x^T over a list's tokens."""

    def add(self, batch: Batch, hidden: Tensor) -> None:
        """Count one batch: hidden (B, T, H)."""
        counted = batch.counted
        sizes = counted.sum(1)
        has_any = sizes > 0
        kept = torch.where(counted[..., None], hidden.float(), 0)
        by_window = kept.sum(1, dtype=torch.float64)
        last = counted.shape[1] - 1 - counted.flip(1).int().argmax(1)
        last_hidden = kept[torch.arange(len(last)), last].double()
        self.tokens.index_add_(0, batch.lists, by_window)
        self.last.index_add_(0, batch.lists, last_hidden)
        self.window_means.index_add_(0, batch.lists, by_window / sizes.clamp(min=1)[:, None])
        self.windows.index_add_(0, batch.lists, has_any.double())
        if self.second_moment is not None:
            weights = (1 / self.counts[batch.lists]).sqrt().float()
            rows = (kept * weights[:, None, None])[counted]
            self.second_moment += (rows.T @ rows).double()

    @property
    def mean(self) -> Tensor:
        """(2 E, H) float64: mean over the tokens of each list, zero where it has none."""
        return self.tokens / self.counts.clamp(min=1)[:, None]

    @property
    def mean_last(self) -> Tensor:
        """(2 E, H) float64: mean over the windows of each list of their last token."""
        return self.last / self.windows.clamp(min=1)[:, None]

    @property
    def mean_of_means(self) -> Tensor:
        """(2 E, H) float64: mean over the windows of each list of their means."""
        return self.window_means / self.windows.clamp(min=1)[:, None]


def sample(batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled hidden states of a batch, (n, H) bfloat16, and the expert whose texts each is from, (n,) int64."""
    owners = (batch.lists // 2)[:, None].expand_as(batch.sampled)
    return hidden[batch.sampled].to(SAMPLE_DTYPE), owners[batch.sampled]


def programmed_rows(gate: Gate, sums: Sums) -> Tensor:
    """Rows of a mode that reads hidden states, before they are scaled: (E, H) float64."""
    if gate.mode == "ridge":
        assert sums.second_moment is not None
        return centred(ridge_rows(sums.second_moment, targets(sums), gate.regularization), gate.center)
    if gate.mode == "base_first":
        return base_first_rows(sums, gate.regularization)
    return directions(_vectors(gate, sums), gate.center)


def directions(vectors: Tensor, center: bool) -> Tensor:
    """Rows of length 1 that point where an expert's texts differ from the others': (E, H) -> (E, H)."""
    rows = centred(vectors, center)
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def centred(rows: Tensor, center: bool) -> Tensor:
    """Rows minus their mean, if `center`. Softmax is invariant to that; lengths and sigmoids are not."""
    return rows - rows.mean(0, keepdim=True) if center and len(rows) > 1 else rows


def base_first_rows(sums: Sums, regularization: float) -> Tensor:
    """The first expert scores about 1 for every token, the others 0: rows (E, H) float64.

    Routers have no bias, so the 1 is a linear function of the hidden state, by ridge regression.
    """
    assert sums.second_moment is not None
    own = sums.counts > 0
    everything = sums.mean[own].sum(0, keepdim=True)
    first = ridge_rows(sums.second_moment, everything, regularization)
    return torch.cat([first, first.new_zeros(len(sums.counts) // 2 - 1, first.shape[1])])


def _vectors(gate: Gate, sums: Sums) -> Tensor:
    """One vector per expert, less that of its negative prompts: (E, H) float64."""
    if gate.mode == "hidden" or (gate.mode == "mean" and gate.pool == "last"):
        by_list = sums.mean_last
    elif gate.mode == "hidden_avg":
        by_list = sums.mean_of_means
    else:
        by_list = sums.mean
    return by_list[::2] - by_list[1::2]


def targets(sums: Sums) -> Tensor:
    """(E, H) float64: b, what the rows are fitted to."""
    mean = sums.mean
    return mean[::2] - mean[1::2]


def ridge_rows(second_moment: Tensor, targets: Tensor, regularization: float) -> Tensor:
    """The linear scores that come closest to 1 for an expert's own tokens and 0 for others'.

    second_moment (H, H), targets (E, H), float64 -> (E, H) float64.

    Closed form, as in DUME (arXiv 2603.29765): rows = b (A + lambda I)^-1 with A the second moment of the hidden states
    and b their means by expert; -1 for an expert's negative prompts. Each expert's texts weigh the same.
    `regularization` is lambda as a share of the mean square of the hidden states.
    """
    hidden_size = second_moment.shape[0]
    penalty = regularization * second_moment.diagonal().mean()
    if penalty == 0:
        return torch.zeros_like(targets)
    regular = second_moment + penalty * torch.eye(hidden_size, dtype=second_moment.dtype)
    return torch.linalg.solve(regular, targets.T, left=True).T.contiguous()


def drawn_rows(
    mode: str, num_layers: int, num_experts: int, hidden_size: int, *, seed: int, initializer_range: float
) -> Tensor:
    """Rows of all layers, (L, E, H) float32; they do not depend on which of the layers get experts.

    `random` is normal with a standard deviation of 1, which sends nearly every token to one expert at full weight,
    `noise` with that of the model's own initialization, `uniform` what `torch.nn.Linear` begins with; rows of
    `orthogonal` have length 1. The first and the third are what mergekit-moe 0.1.5 draws from the same seed.
    """
    generator = Generator().manual_seed(seed)
    shape = (num_layers, num_experts, hidden_size)
    if mode == "gateless":
        return torch.zeros(shape)
    if mode == "uniform":
        bound = math.sqrt(1.0 / hidden_size)
        return torch.rand(shape, generator=generator) * 2 * bound - bound
    rows = torch.randn(shape, generator=generator)
    if mode == "random":
        return rows
    if mode == "noise":
        return rows * initializer_range
    assert mode == "orthogonal", mode
    if num_experts > hidden_size:
        raise RecipeError(
            f"{num_experts} experts cannot have orthogonal gates in {hidden_size} dimensions; set gate.mode to random"
        )
    return torch.linalg.qr(rows.mT).Q.mT.contiguous()


def entropy(logits: Tensor, scores: Scores = "softmax") -> Tensor:
    """Entropy of routing weights before the top k are taken, as a share of its maximum: (N, E) -> (N,) float64."""
    num_experts = logits.shape[-1]
    if num_experts == 1:
        return torch.zeros(logits.shape[:-1], dtype=torch.float64)
    logits = logits.double()
    if scores == "sigmoid":
        logits = torch.nn.functional.logsigmoid(logits)
    log_weights = logits.log_softmax(-1)
    return -(log_weights.exp() * log_weights).sum(-1) / math.log(num_experts)


def scale_for(logits: Tensor, target: float, scores: Scores = "softmax") -> float | None:
    """The factor on logits (N, E) at which their mean entropy is `target`; None where none comes close.

    The smallest such factor: softmax has one, sigmoid may have several, as its weights are flat again where all scores
    saturate.
    """

    def at(scale: float) -> float:
        return entropy(logits * scale, scores).mean().item()

    if logits.shape[-1] == 1 or not logits.numel():
        return None
    spread = (logits - logits.mean(-1, keepdim=True)).abs().mean().item()
    if spread == 0:
        return None
    low = 2.0 ** _OCTAVES[0] / spread
    for _ in range(_OCTAVES[1] - _OCTAVES[0]):
        high = low * 2
        if at(high) <= target:
            break
        low = high
    else:
        return None
    for _ in range(50):  # float64 has 52 bits
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle) > target else (low, middle)
    return high
