"""`OffloadConfig`: everything a user can ask for, validated once, at the door.

A frozen dataclass that Transformers accepts as a quantization config, because it has a `quant_method` and can be
written to and read from a dictionary; nothing here imports Transformers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

from transformers_moe_offload.errors import ConfigError

Arithmetic = Literal["fast", "exact"]
Misses = Literal["auto", "fetch"]

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

_NOT_YET = {
    "experts": "quantizing experts",
    "dense": "quantizing dense layers",
}


@dataclass(frozen=True)
class Budget:
    """A parsed memory budget: so many bytes, or a share of all experts, or `auto` when both are None."""

    nbytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, value: object, option: str) -> Budget:
        """Read `6442450944`, `"6GiB"`, `"6 GB"`, `"40%"` or `"auto"`; `option` is named in the error."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value <= 0:
                raise ConfigError(f"{option}={value} is not a positive number of bytes")
            return cls(nbytes=value)
        if isinstance(value, str):
            text = value.strip().lower()
            if text == "auto":
                return cls()
            match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([a-z]*|%)", text)  # 18 digits: every float of them is finite
            if match and match[2] == "%" and 0 < float(match[1]) <= 100:
                return cls(share=float(match[1]) / 100)
            if match and match[2] in _UNITS and int(float(match[1]) * _UNITS[match[2]]) > 0:
                return cls(nbytes=int(float(match[1]) * _UNITS[match[2]]))
        raise ConfigError(
            f"{option}={value!r} is not a budget; write bytes as an int, a size such as '6GiB' or '500MB', "
            f"a share of all experts above '0%' and up to '100%', or 'auto'"
        )

    def resolve(self, all_experts: int, available: int) -> int:
        """The budget in bytes, given the bytes of all experts and the bytes `auto` may take."""
        if self.nbytes is not None:
            return self.nbytes
        if self.share is not None:
            return int(self.share * all_experts)
        return min(all_experts, available)


@dataclass(frozen=True, kw_only=True)
class PrefetchConfig:
    """How to load experts before a layer asks for them.

    Args:
        predictor: who guesses: `"next_router"` asks the routers of the layers ahead about the hidden states of this
            one, `"last_token"` expects what the layer wanted at the last token, `"transition"` learns which expert
            follows which; or a name given to `register_predictor`.
        lookahead: how many sparse layers ahead to guess, 1 to 4: the slower experts arrive, the earlier they must set
            out, and the less sure the guesses are.
        min_confidence: guesses that come true less often than this are not acted upon, 0 to 1.
        max_bytes: most bytes to start loading ahead during one sparse layer; None means what the measured bandwidth
            can carry in the time that demand leaves.
        adaptive: try now and then whether steps are faster with prefetching, and leave it off while they are not.
    """

    predictor: str = "next_router"
    lookahead: int = 1
    min_confidence: float = 0.5
    max_bytes: int | str | None = None
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, str):
            raise ConfigError(f"predictor={self.predictor!r} is not the name of a predictor; register yours first")
        if type(self.lookahead) is not int or not 1 <= self.lookahead <= 4:
            raise ConfigError(f"lookahead={self.lookahead!r} is not a number of sparse layers from 1 to 4")
        if isinstance(self.min_confidence, bool) or not isinstance(self.min_confidence, int | float):
            raise ConfigError(f"min_confidence={self.min_confidence!r} is not a number from 0 to 1")
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence={self.min_confidence!r} is not from 0 to 1")
        if self.max_bytes is not None and Budget.parse(self.max_bytes, "max_bytes").nbytes is None:
            raise ConfigError(f"max_bytes={self.max_bytes!r} is not a size such as '64MiB', or None")
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"adaptive={self.adaptive!r} is not True or False")

    @property
    def max_nbytes(self) -> int | None:
        """`max_bytes`, parsed."""
        return None if self.max_bytes is None else Budget.parse(self.max_bytes, "max_bytes").nbytes


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(dict[str, Any]):
    """How to offload the routed experts of a model.

    Pass it to any `from_pretrained` as `moe_offload=` or `quantization_config=`.

    Args:
        cache_budget: bytes of the fast tier (GPU memory; RAM on a machine without GPU) that hold experts: an int,
            `"6GiB"`, `"40%"` of all experts, or `"auto"`, which takes what is free after the dense weights, less a
            reserve, and never more than all experts need. With several GPUs the budget is shared out among them.
        policy: which expert leaves when another one needs its slot: `"lru"`, or a name given to `register_policy`.
        misses: `"fetch"` loads an expert that is not resident and then uses it; `"auto"` chooses, today always `fetch`.
        arithmetic: `"exact"` computes the experts with the model's own eager code, bit for bit; `"fast"` may use
            better kernels and orders of summation and is at least as close to exact arithmetic.
        mmap: on a CPU machine, use experts where they lie in the page cache instead of copying them into slots; the
            pages stay the system's, which takes them back when it needs them. `"auto"` does so where all experts fit
            into free RAM but not into the cache, and can be used as they are stored; False copies, so that
            `cache_budget` bounds what the process holds; True insists, and is an error where it cannot be done.
        direct_io: read experts past the page cache, where system and filesystem allow it; `"auto"` does so where not
            all experts fit into free RAM.
        io_workers: threads that read experts; None means one per core, four at most.
        pin_memory: stage reads for a GPU in page-locked memory; `"auto"` means wherever there is a GPU.
        prefetch: load experts before they are asked for: a `PrefetchConfig`, a dictionary of its fields, or None.
        host_budget: on a machine with GPU, RAM that holds experts between disk and cache: as `cache_budget`; `"auto"`
            takes half of the free RAM, and never more than all experts need.
        experts: not available yet; only None, experts as they are stored.
        dense: not available yet; only None.

    It is a dictionary of its fields, too: pipelines hand the model's keyword arguments to the tokenizer as well, which
    writes them to JSON when it is saved.
    """

    quant_method: ClassVar[str] = "moe_offload"

    cache_budget: int | str = "auto"
    host_budget: int | str = "auto"
    policy: str = "lru"
    prefetch: PrefetchConfig | None = None
    experts: None = None
    dense: None = None
    misses: Misses = "auto"
    arithmetic: Arithmetic = "fast"
    io_workers: int | None = None
    pin_memory: bool | Literal["auto"] = "auto"
    mmap: bool | Literal["auto"] = "auto"
    direct_io: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        Budget.parse(self.cache_budget, "cache_budget")
        Budget.parse(self.host_budget, "host_budget")
        defaults = {f.name: f.default for f in fields(self)}
        for name, feature in _NOT_YET.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: {feature} is not available yet; "
                    f"leave {name} at {defaults[name]!r}"
                )
        if not isinstance(self.policy, str):
            raise ConfigError(f"policy={self.policy!r} is not the name of a policy; register yours and pass its name")
        _choose("misses", self.misses, get_args(Misses), later={"compute": "computing misses on the host"})
        _choose("arithmetic", self.arithmetic, get_args(Arithmetic))
        if self.io_workers is not None and (type(self.io_workers) is not int or self.io_workers < 1):
            raise ConfigError(f"io_workers={self.io_workers!r} is not a positive number of threads")
        for name in ("pin_memory", "mmap", "direct_io"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ConfigError(f"{name}={value!r} is not one of True, False, 'auto'")
        if isinstance(self.prefetch, Mapping):
            object.__setattr__(self, "prefetch", _with_options(PrefetchConfig, self.prefetch))
        if self.prefetch is not None and not isinstance(self.prefetch, PrefetchConfig):
            raise ConfigError(
                f"prefetch={self.prefetch!r} is not a PrefetchConfig, a dictionary of its fields, or None"
            )
        self.update(self.to_dict())

    @property
    def budget(self) -> Budget:
        """`cache_budget`, parsed."""
        return Budget.parse(self.cache_budget, "cache_budget")

    @classmethod
    def make(cls, value: OffloadConfig | Mapping[str, Any] | str | bool | None) -> OffloadConfig | None:
        """The config a `moe_offload=` argument stands for; None where it asks for no offloading."""
        if value is None or value is False:
            return None
        if value is True or value == "auto":
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            made: OffloadConfig = cls.from_dict(dict(value))
            return made
        raise ConfigError(
            f"moe_offload={value!r} is not an OffloadConfig, a dictionary of its fields, 'auto', True, False or None"
        )

    # What Transformers calls on a quantization config.

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a config from a dictionary; unknown keys are an error that suggests the nearest option."""
        config = _with_options(cls, {key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields and `quant_method`, ready for JSON."""
        return {"quant_method": self.quant_method} | {f.name: self._plain(f.name) for f in fields(self)}

    def to_diff_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, and `quant_method`."""
        changed = {f.name: self._plain(f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"quant_method": self.quant_method} | changed

    def _plain(self, name: str) -> Any:
        """A field as JSON knows it."""
        value = getattr(self, name)
        return asdict(value) if isinstance(value, PrefetchConfig) else value

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict` or `to_dict` as JSON text."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"


_Config = TypeVar("_Config", OffloadConfig, PrefetchConfig)


def _with_options(cls: type[_Config], options: Mapping[str, Any]) -> _Config:
    """A config with these options; an unknown one is an error that suggests the nearest."""
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(known)}"
            raise ConfigError(f"{cls.__name__} has no option {key!r}; {hint}")
    return cls(**options)


def _choose(option: str, value: object, choices: tuple[str, ...], later: Mapping[str, str] | None = None) -> None:
    """Refuse a value that is not one of the choices; `later` names the feature of choices still to come."""
    if value in choices:
        return
    if later and isinstance(value, str) and value in later:
        raise ConfigError(f"{option}={value!r}: {later[value]} is not available yet; use one of {list(choices)}")
    raise ConfigError(f"{option}={value!r} is not one of {list(choices)}")
