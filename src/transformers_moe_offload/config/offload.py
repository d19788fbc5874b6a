"""`OffloadConfig`: everything a user can ask for, validated once, at the door.

A frozen dataclass that Transformers accepts as a quantization config, because it has a `quant_method` and can be
written to and read from a dictionary; nothing here imports Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.config.formats import ExpertFormats, HqqFormat, make_format
from transformers_moe_offload.config.options import choose, parsed, with_options
from transformers_moe_offload.config.prefetch import PrefetchConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.untrusted import one_line, quoted

Arithmetic = Literal["fast", "exact", "int8"]
Misses = Literal["auto", "fetch", "compute"]
Decode = Literal["host", "device", "graph"]

RECIPE_VERSION = 1
"""Version of the recipe in `config.json` of a checkpoint with quantized experts."""


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(dict[str, Any]):
    """How to offload the routed experts of a model.

    Pass it to any `from_pretrained` as `moe_offload=` or `quantization_config=`.

    Args:
        cache_budget: bytes of the fast tier (GPU memory; RAM on a machine without GPU) that hold experts: an int,
            `"6GiB"`, `"40%"` of all experts, or `"auto"`, which takes what is free after the dense weights, less a
            reserve, and never more than all experts need. With several GPUs the budget is shared out among them.
        policy: which expert leaves when another one needs its slot: `"lru"`, or a name given to `register_policy`.
        misses: on a machine with GPU, `"fetch"` moves an expert that is not resident there and then uses it;
            `"compute"` has the host compute it instead where that is faster, which is not bit for bit the same;
            `"auto"` does so where it is faster by a fifth, and never with `arithmetic="exact"`. Without a GPU there
            is only `"fetch"`.
        arithmetic: `"exact"` computes the experts with the model's own eager code, bit for bit; `"fast"` may use
            better kernels and orders of summation and is at least as close to exact arithmetic; `"int8"` is `"fast"`
            with the inputs of products with quantized weights rounded to 8 bits, which is faster yet and about 1 %
            off.
        decode: where the routing has to be known. `"host"`: the host asks the cache layer by layer, and fetches.
            `"device"`, on a machine with GPU: kernels read experts by address, in slots or, where they are not
            resident, in page-locked host memory, and the cache follows behind. That takes page-locked memory for all
            experts, within `host_budget`. `"graph"` besides captures whole steps of
            `generate(cache_implementation="static")` in CUDA graphs. Prompts, training, and all else
            that needs the host are computed as with `"host"`, and the log says so. No GPU has run this so far.
        mmap: on a CPU machine, use experts where they lie in the page cache instead of copying them into slots; the
            pages stay the system's, which takes them back when it needs them. `"auto"` does so where all experts fit
            into free RAM but not into the cache, and can be used as they are stored; False copies, so that
            `cache_budget` bounds what the process holds; True insists, and is an error where it cannot be done.
        direct_io: read experts past the page cache, where system and filesystem allow it; `"auto"` does so where not
            all experts fit into free RAM and a short trial on the checkpoint's files finds it faster.
        io_workers: threads that read experts; None means one per core, four at most.
        pin_memory: stage reads for a GPU in page-locked memory, of which there is never more than 64 MiB for each GPU;
            `"auto"` means wherever there is a GPU.
        prefetch: load experts before they are asked for: a `PrefetchConfig`, a dictionary of its fields, or None.
        host_budget: on a machine with GPU, RAM that holds experts between disk and cache: as `cache_budget`; `"auto"`
            takes half of the free RAM, and never more than all experts need.
        experts: quantize the experts while loading: an `HqqFormat`, an `ExpertFormats` for different formats by layer
            or expert (or a dictionary of fields), or None, experts as they are stored. The quantized ones are kept in
            RAM; `moe-offload quantize` writes them to disk once and for all.
        dense: quantize the linear layers of attention and dense MLPs, too: an `HqqFormat` or None.
        lm_head: quantize the output embedding, too: an `HqqFormat` or None. It has to have a matrix of its own, as most
            MoEs have, and not the input embedding's.

    It is a dictionary of its fields, too: pipelines hand the model's keyword arguments to the tokenizer as well, which
    writes them to JSON when it is saved.
    """

    quant_method: ClassVar[str] = "moe_offload"

    cache_budget: int | str = "auto"
    host_budget: int | str = "auto"
    policy: str = "lru"
    prefetch: PrefetchConfig | None = None
    experts: HqqFormat | ExpertFormats | None = None
    dense: HqqFormat | None = None
    lm_head: HqqFormat | None = None
    misses: Misses = "auto"
    decode: Decode = "host"
    arithmetic: Arithmetic = "fast"
    io_workers: int | None = None
    pin_memory: bool | Literal["auto"] = "auto"
    mmap: bool | Literal["auto"] = "auto"
    direct_io: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        Budget.parse(self.cache_budget, "cache_budget")
        Budget.parse(self.host_budget, "host_budget")
        if not isinstance(self.experts, HqqFormat):
            object.__setattr__(self, "experts", ExpertFormats.make(self.experts))
        object.__setattr__(self, "dense", make_format("dense", self.dense))
        object.__setattr__(self, "lm_head", make_format("lm_head", self.lm_head))
        if not isinstance(self.policy, str):
            raise ConfigError(
                f"policy={quoted(self.policy)} is not the name of a policy; register yours and pass its name"
            )
        choose("misses", self.misses, get_args(Misses))
        choose("decode", self.decode, get_args(Decode))
        choose("arithmetic", self.arithmetic, get_args(Arithmetic))
        if self.io_workers is not None and (type(self.io_workers) is not int or self.io_workers < 1):
            raise ConfigError(f"io_workers={quoted(self.io_workers)} is not a positive number of threads")
        for name in ("pin_memory", "mmap", "direct_io"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ConfigError(f"{name}={quoted(value)} is not one of True, False, 'auto'")
        if isinstance(self.prefetch, Mapping):
            object.__setattr__(self, "prefetch", with_options(PrefetchConfig, self.prefetch))
        if self.prefetch is not None and not isinstance(self.prefetch, PrefetchConfig):
            raise ConfigError(
                f"prefetch={quoted(self.prefetch)} is not a PrefetchConfig, a dictionary of its fields, or None"
            )
        super().update(self.to_dict())

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles are made anew: filling a dictionary entry by entry would be changing it.
        return partial(type(self), **{f.name: getattr(self, f.name) for f in fields(self)}), ()

    def _is_frozen(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "an OffloadConfig cannot be changed; make another one, with dataclasses.replace(config, cache_budget=...)"
        )

    __setitem__ = __delitem__ = __ior__ = _is_frozen
    update = setdefault = popitem = clear = _is_frozen

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dictionary for a missing key with a default, which Transformers pops a lot; else an error."""
        return self._is_frozen() if key in self or not default else default[0]

    @property
    def formats(self) -> ExpertFormats | None:
        """`experts`, by layer."""
        return ExpertFormats.make(self.experts)

    @property
    def is_quantizing(self) -> bool:
        """Whether any weight gets a format."""
        has_experts = self.formats is not None and not self.formats.leaves_all_as_they_are
        return has_experts or self.dense is not None or self.lm_head is not None

    @property
    def budget(self) -> Budget:
        """`cache_budget`, parsed."""
        return Budget.parse(self.cache_budget, "cache_budget")

    def recipe(self) -> dict[str, Any]:
        """The entry in `config.json` of a checkpoint that was quantized by this config; `lm_head` only if it was."""
        return {
            "quant_method": self.quant_method,
            "version": RECIPE_VERSION,
            "experts": self.formats and self.formats.plain(),
            "dense": self._plain("dense"),
        } | ({"lm_head": self._plain("lm_head")} if self.lm_head is not None else {})

    def override(self, given: OffloadConfig) -> OffloadConfig:
        """This config of a quantized checkpoint, with the budgets and policies of one that was `given` for loading it.

        Raises `ConfigError` if that one asks for another format; how its codes were found makes no difference.
        """
        for name, asked, stored in (
            ("experts", given.formats, self.formats),
            ("dense", given.dense, self.dense),
            ("lm_head", given.lm_head, self.lm_head),
        ):
            if asked is not None and (stored is None or asked.as_stored() != stored.as_stored()):
                raise ConfigError(
                    f"{name}={one_line(getattr(given, name))} was asked for, but the checkpoint was quantized with "
                    f"{name}={one_line(getattr(self, name))}; leave OffloadConfig.{name} out, or quantize the "
                    "original checkpoint again"
                )
        made: OffloadConfig = self.from_dict(given.to_dict() | self.recipe())
        return made

    @classmethod
    def make(cls, value: OffloadConfig | Mapping[str, Any] | str | bool | None) -> OffloadConfig | None:
        """The config a `moe_offload=` argument stands for; None where it asks for no offloading.

        Command lines pass on strings, so `"true"`, `"false"`, `"none"` and a JSON object of the fields are understood.
        """
        if isinstance(value, str):
            value = parsed("moe_offload", value)
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
            f"moe_offload={quoted(value)} is not an OffloadConfig, a dictionary of its fields (or one in JSON), "
            "'auto', True, False or None"
        )

    # What Transformers calls on a quantization config.

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a config from a dictionary; unknown keys are an error that suggests the nearest option."""
        version = config_dict.get("version", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            raise ConfigError(
                f"the checkpoint's recipe has version {quoted(version)}, and this version of transformers-moe-offload "
                f"reads version {RECIPE_VERSION}; upgrade the package"
            )
        options = {key: value for key, value in config_dict.items() if key not in ("quant_method", "version")}
        config = with_options(cls, options)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields and `quant_method`, ready for JSON."""
        return {"quant_method": self.quant_method} | {f.name: self._plain(f.name) for f in fields(self)}

    def to_diff_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, and `quant_method`."""
        changed = {f.name: self._plain(f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"quant_method": self.quant_method} | changed

    def _plain(self, name: str) -> Any:
        """A field as JSON values."""
        value = getattr(self, name)
        if isinstance(value, ExpertFormats):
            return value.plain()
        return asdict(value) if isinstance(value, PrefetchConfig | HqqFormat) else value

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict` or `to_dict` as JSON text."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"
