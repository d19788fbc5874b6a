"""The config of a mixture of adapters. It goes along with published models, so it imports nothing of ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

_SITES = ("ffn", "linear", "model")
_SCORINGS = ("softmax", "sigmoid", "arrow", "uniform")

_errors = sys.modules.get("transformers_moe_offload.errors")  # None for a checkpoint's copy without the package
_OURS: tuple[type[Exception], ...] = () if _errors is None else (_errors.MoeOffloadError,)


class AdapterMoeError(*_OURS, ValueError):  # type: ignore[misc]
    """A mixture of adapters that cannot be, with the reason; one of the package's errors where that is imported."""


class AdapterMoeConfig(PreTrainedConfig):
    """A dense model whose experts are LoRA adapters.

    Attributes:
        text_config: the config of the dense model.
        adapters: the adapters' names, in the order of the routers' rows; each is a PEFT folder `adapters/NAME`.
        target_modules: the linear layers that some adapter adds to, by the ends of their paths, as PEFT has them.
        rank: the largest rank among the adapters; the others are padded with zeros in memory.
        router_per: what shares a router: the linear layers of one feed-forward block (`ffn`; others have one each),
            each `linear` layer has one, or the whole `model` has one, on the embeddings.
        scoring: how logits become weights: `softmax` over the chosen experts, `sigmoid` of each, `arrow`
            (softmax over the size of the logits; arXiv 2405.11157), or `uniform`: all experts alike, without a router.
        num_experts_per_tok: experts that a token takes.
        temperature: logits are divided by it.
    """

    model_type = "adapter_moe"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}  # noqa: RUF012
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    adapters: list[str] | tuple[str, ...] = ()
    target_modules: list[str] | tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    rank: int = 16
    router_per: str = "ffn"
    scoring: str = "softmax"
    num_experts_per_tok: int = 2
    temperature: float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse what no model can be built of."""
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.adapters, self.target_modules = list(self.adapters), list(self.target_modules)
        for name, choices in (("router_per", _SITES), ("scoring", _SCORINGS)):
            if getattr(self, name) not in choices:
                raise AdapterMoeError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if len(set(self.adapters)) < len(self.adapters):
            raise AdapterMoeError(f"adapters={self.adapters} has a name twice")
        bad = [name for name in self.adapters if name in ("", ".", "..") or "/" in name or "\\" in name]
        if bad:
            raise AdapterMoeError(f"{bad[0]!r} is no name for an adapter: it is the name of its folder")
        if self.scoring == "uniform":
            self.num_experts_per_tok = max(1, len(self.adapters))
        if self.adapters and not 1 <= self.num_experts_per_tok <= len(self.adapters):
            raise AdapterMoeError(
                f"num_experts_per_tok={self.num_experts_per_tok}, but the number of adapters is {len(self.adapters)}"
            )
        if not self.temperature > 0:
            raise AdapterMoeError(f"temperature={self.temperature} is not a positive number")

    @property
    def adapter_folders(self) -> list[str]:
        """Where the adapters are on this machine, as absolute paths; empty for a model that is not read from files."""
        return list(vars(self).get("_adapter_folders", ()))

    @adapter_folders.setter
    def adapter_folders(self, folders: list[str]) -> None:
        self._adapter_folders = [str(Path(folder).absolute()) for folder in folders]

    def to_dict(self) -> dict[str, Any]:
        """What is saved: without the folders."""
        saved = super().to_dict()
        saved.pop("_adapter_folders", None)
        return saved

    @property
    def num_experts(self) -> int:
        """How many adapters there are."""
        return len(self.adapters)


__all__ = ["AdapterMoeConfig"]
