"""`MoeRecipe`: what to build, from what, into what. Values that cannot be are refused here; how a file is read is in
`reading.py`, whether the sources fit together in `plan.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers_moe_offload.errors import RecipeError

KINDS = ("moe", "upcycle", "split")
STEM_METHODS = ("base", "average", "ties", "dare")
GATE_MODES = (
    "ridge",
    "mean",
    "hidden",
    "hidden_avg",
    "cheap_embed",
    "random",
    "uniform",
    "noise",
    "orthogonal",
    "base_first",
    "gateless",
)
SPLIT_METHODS = ("random", "k_means", "co_activation")
LEVELS = ("error", "warn", "off")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a dense model comes from.

    Args:
        model: a folder, an id on the Hub, or `id@revision`.
        revision: branch, tag or commit on the Hub.
        adapter: a LoRA adapter that is merged into the model, tensor by tensor; a folder, id or `id@revision`.
        extract_rank: instead of the model itself, what a LoRA of this rank keeps of its difference to the base model
            (truncated singular value decomposition).
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    extract_rank: int | None = None

    def __post_init__(self) -> None:
        _expect_texts(self, "model", "revision", "adapter")
        _expect_positive(self, "extract_rank")
        if self.adapter is not None and self.extract_rank is not None:
            raise RecipeError(
                f"adapter={self.adapter!r} and extract_rank={self.extract_rank} exclude each other: an adapter has a "
                f"rank already; leave one of them out"
            )

    def __str__(self) -> str:
        model = f"{self.model}@{self.revision}" if self.revision else self.model
        return f"{model}+{self.adapter}" if self.adapter else model


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Text to calibrate gates with.

    Args:
        path: a text file, a JSON-lines file, or the id of a data set on the Hub (needs `datasets`).
        split: as in `datasets.load_dataset`, for instance `"train[:200]"`.
        text: the column that holds the text.
        max_tokens: how much of it is used.
    """

    path: str
    split: str = "train"
    text: str = "text"
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        _expect_texts(self, "path", "split", "text")
        _expect_positive(self, "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One routed expert: the feed-forward blocks of a dense model, and what should be sent to it.

    Args:
        source: the dense model it is taken from; None means the base model.
        name: what it is called in reports and on the card; by default the source's.
        positive_prompts, negative_prompts: texts that should, and should not, be routed to it.
        dataset: more text of the first kind.
        noise_scale: standard deviation of normal noise on its weights.
        residual_scale: factor on what it adds to the residual stream.
        delta_scale: how far it goes from the base model towards its source: base + delta_scale * (source - base).
    """

    source: Origin | None = None
    name: str | None = None
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    dataset: Dataset | None = None
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    delta_scale: float = 1.0

    def __post_init__(self) -> None:
        _freeze_texts(self, "positive_prompts", "negative_prompts")
        _expect_texts(self, "name")
        _expect_numbers(self, "noise_scale", "residual_scale", "delta_scale")
        if self.noise_scale < 0:
            raise RecipeError(f"noise_scale={self.noise_scale} is a standard deviation and cannot be negative")


@dataclass(frozen=True, kw_only=True)
class SharedExpert(Expert):
    """An expert that every token visits.

    Args:
        gated: its output is weighted by a gate of its own, where the container has one.
        delta: routed experts hold the difference to it only, so that an expert and it add up to the expert's source.
    """

    gated: bool = False
    delta: bool = False


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How the routers get their weights.

    Args:
        mode: `ridge` regression onto the experts, the `mean` of their texts' hidden states, mergekit's `hidden` (last
            token) and `hidden_avg`, `cheap_embed`dings; without texts: `random`, `uniform`, `noise`, `orthogonal`,
            `base_first` (the first expert unless trained otherwise), `gateless` (all experts alike).
        site: where hidden states are read: `router_input`, or `layer_input` as mergekit does.
        pool: `mean` over tokens or the `last` one, for `mode="mean"`.
        skip_bos: leave the first token out, whose hidden state is like no other's.
        center: take away what all experts' rows have in common.
        scale: of the rows; `auto` calibrates it to `target_entropy`.
        target_entropy: of the routing weights before the top k are taken, as a share of its maximum, 0 to 1.
        regularization: of the ridge regression, as a share of the hidden states' mean square.
        scoring: `mergekit` computes gates exactly as mergekit-moe 0.1.5 does, `ours` in float32.
        seed: of whatever is drawn.
    """

    mode: str = "ridge"
    site: str = "router_input"
    pool: str = "mean"
    skip_bos: bool = True
    center: bool = True
    scale: float | str = "auto"
    target_entropy: float = 0.7
    regularization: float = 0.01
    scoring: str = "ours"
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_choice(self, "mode", GATE_MODES)
        _expect_choice(self, "site", ("router_input", "layer_input"))
        _expect_choice(self, "pool", ("mean", "last"))
        _expect_choice(self, "scoring", ("ours", "mergekit"))
        _expect_numbers(self, "target_entropy", "regularization")
        if isinstance(self.scale, str):
            _expect_choice(self, "scale", ("auto",))
        elif not self.scale > 0:
            raise RecipeError(f"scale={self.scale} is not a positive number, or 'auto'")
        if not 0 < self.target_entropy < 1:
            raise RecipeError(f"target_entropy={self.target_entropy} is a share between 0 and 1")
        if not self.regularization > 0:
            raise RecipeError(f"regularization={self.regularization} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class Stem:
    """Everything that is no feed-forward block: attention, embeddings, norms, head.

    Args:
        method: the `base` model's, or the experts' sources merged: `average`, `ties` (arXiv 2306.01708) or `dare`
            (arXiv 2311.03099).
        source: another model to take it from; goes with `method="base"`.
        density: share of each difference that TIES keeps, or that DARE does not drop.
        weight: factor on the merged difference.
        seed: of what DARE drops.
    """

    method: str = "base"
    source: Origin | None = None
    density: float = 0.5
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_choice(self, "method", STEM_METHODS)
        _expect_numbers(self, "density", "weight")
        if not 0 < self.density <= 1:
            raise RecipeError(f"density={self.density} is a share, above 0 and at most 1")
        if self.source is not None and self.method != "base":
            raise RecipeError(
                f"stem: source={self.source} takes the stem from one model, method={self.method!r} merges several; "
                f"leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Experts that are copies of one dense model's feed-forward blocks (kind `upcycle`).

    Args:
        num_experts: how many.
        granularity: cut each copy into this many experts (arXiv 2410.07524); its weights are scaled so that the sum
            over a token's experts keeps the dense block's size.
        reinitialize: share of each expert's channels that is drawn anew from the block's own statistics (Drop-
            Upcycling, arXiv 2502.19261).
    """

    num_experts: int = 8
    granularity: int = 1
    reinitialize: float = 0.0

    def __post_init__(self) -> None:
        _expect_positive(self, "num_experts", "granularity")
        _expect_numbers(self, "reinitialize")
        if not 0 <= self.reinitialize < 1:
            raise RecipeError(f"reinitialize={self.reinitialize} is a share, from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Experts that are parts of one dense model's feed-forward blocks (kind `split`).

    Args:
        num_experts: into how many parts.
        method: which channels go together: `random`, `k_means` on the weights, or those that are active together on
            calibration text (`co_activation`).
        shared: how many parts make up a block that every token visits, where the container has shared experts.
        dataset: the calibration text.
        seed: of whatever is drawn.
    """

    num_experts: int = 8
    method: str = "k_means"
    shared: int = 0
    dataset: Dataset | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_positive(self, "num_experts")
        _expect_choice(self, "method", SPLIT_METHODS)


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is checked of the built model before it is put in its place. `identity`, `forced_expert` and `reload` cannot
    be turned off.

    Args:
        similarity: what happens if an expert has little in common with the base model: `error`, `warn` or `off`.
        licence: what happens if licences of sources exclude each other.
    """

    similarity: str = "warn"
    licence: str = "error"

    def __post_init__(self) -> None:
        _expect_choice(self, "similarity", LEVELS)
        _expect_choice(self, "licence", LEVELS)


@dataclass(frozen=True, kw_only=True)
class Output:
    """How the checkpoint is written.

    Args:
        max_shard_size: as in `save_pretrained`.
    """

    max_shard_size: int | str = "5GB"


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where and how it is published, with `--push` or `publish`.

    Args:
        repo_id: the repository.
        private: whether a new one is private.
        license: instead of what follows from the sources' licences.
        tags: beside our own.
        create_pr: upload as a pull request.
        revision: branch to upload to.
    """

    repo_id: str | None = None
    private: bool | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    create_pr: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        _freeze_texts(self, "tags")


@dataclass(frozen=True, kw_only=True)
class MoeRecipe:
    """A mixture of experts to build.

    Args:
        base_model: the dense model whose attention, embeddings, norms and head are used, and whose hidden states the
            gates are computed from.
        kind: `moe` of several dense models, or of one: `upcycle` (copies) or `split` (parts).
        experts: the routed experts, in their order.
        shared_experts: experts that every token visits.
        experts_per_token: how many routed experts a token visits.
        container: the model type to build, as `mixtral`; `auto` takes the first that fits.
        dtype: of the written weights; None means as the base model is stored.
        layers: decoder layers that get experts; the others keep the base model's block. None means all.
        gate, stem, upcycle, split, checks, output, hub: see there.
        tokenizer: where the tokenizer comes from; None means the base model.
    """

    base_model: Origin
    kind: str = "moe"
    experts: tuple[Expert, ...] = ()
    shared_experts: tuple[SharedExpert, ...] = ()
    experts_per_token: int = 2
    container: str = "auto"
    dtype: str | None = None
    layers: tuple[int, ...] | None = None
    gate: Gate = field(default_factory=Gate)
    stem: Stem = field(default_factory=Stem)
    upcycle: Upcycle | None = None
    split: Split | None = None
    tokenizer: str | None = None
    checks: Checks = field(default_factory=Checks)
    output: Output = field(default_factory=Output)
    hub: Hub = field(default_factory=Hub)

    def __post_init__(self) -> None:
        _expect_choice(self, "kind", KINDS)
        _expect_texts(self, "container", "dtype", "tokenizer")
        _expect_positive(self, "experts_per_token")
        for name in ("experts", "shared_experts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        self._expect_kind()

    def _expect_kind(self) -> None:
        """What belongs to another kind is an error, not ignored."""
        for kind in ("upcycle", "split"):
            if getattr(self, kind) is not None and self.kind != kind:
                raise RecipeError(f"{kind}: is given, but kind is {self.kind!r}; set kind: {kind}, or leave it out")
        if self.kind == "moe" and len(self.experts) < self.experts_per_token:
            raise RecipeError(
                f"experts_per_token={self.experts_per_token}, but there are {len(self.experts)} experts; add experts, "
                f"or set experts_per_token to {max(1, len(self.experts))} or less"
            )
        if self.kind != "moe" and self.experts:
            raise RecipeError(
                f"kind: {self.kind} makes its experts from the base model, but {len(self.experts)} experts are given; "
                f"set kind: moe, or leave them out"
            )


def _expect_choice(owner: Any, name: str, choices: Sequence[str]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise RecipeError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _expect_texts(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        is_optional = next(f for f in fields(owner) if f.name == name).default is None
        if not (isinstance(value, str) and value) and not (value is None and is_optional):
            raise RecipeError(f"{name}={value!r} is not a text")


def _expect_positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (type(value) is not int or value < 1):
            raise RecipeError(f"{name}={value!r} is not a whole number of at least 1")


def _expect_numbers(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{name}={value!r} is not a number")


def _freeze_texts(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, str) or not all(isinstance(text, str) for text in value):
            raise RecipeError(f"{name}={value!r} is not a list of texts")
        object.__setattr__(owner, name, tuple(value))
