"""`OffloadConfig` from mappings and from the JSON of a command line, and the recipe in a prebuilt `config.json`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import damaged, mutated
from transformers_moe_offload import ConfigError, OffloadConfig
from transformers_moe_offload.config import HqqFormat
from transformers_moe_offload.policies import make_policy

_OPTIONS = {
    "cache_budget": "6GiB", "host_budget": "40%", "policy": "lru", "misses": "fetch", "decode": "host", "mmap": False,
    "arithmetic": "fast", "io_workers": 2, "pin_memory": "auto", "direct_io": True,
    "prefetch": {"predictor": "last_token", "lookahead": 2, "min_confidence": 0.5, "max_bytes": "64MiB"},
    "experts": {
        "default": {"nbits": 4, "group_size": 64}, "layers": {"0-3": None, "5": {"nbits": 2, "group_size": 16}},
        "hot": {"nbits": 8}, "hot_experts": {"0": [1, 2], "1-2": [0]},
    },
    "dense": {"nbits": 4, "group_size": 64, "axis": 1, "meta_nbits": 8, "optimize": True}, "lm_head": {"nbits": 8},
}  # fmt: skip
_KEYS = {
    "experts": {"nbits": 3}, "layers": {"0-9999999999": None}, "hot_experts": {"0": [0] * 3}, "version": 2, "nbits": 4,
    "quant_method": "moe_offload", "cache_buget": "1GiB", "-1": None, "9" * 4000: None, "0-2": {"nbits": 4},
}  # fmt: skip
_TOKENS = (b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"0-9999999999", b"NaN", b"\\ud800", b"'")


def cases(rng: random.Random) -> Iterator[Any]:
    while True:
        if rng.random() < 0.8:
            yield mutated(rng, _OPTIONS, _KEYS)
        else:
            yield damaged(rng, json.dumps(_OPTIONS).encode(), _TOKENS).decode("utf-8", "replace")


def run(case: Any) -> None:
    config = OffloadConfig.make(case)
    if config is None:
        return
    assert deepcopy(config) == config
    assert OffloadConfig.make(config.to_json_string(use_diff=False)) == config
    hash(config.formats)
    str(config.formats)
    assert config.override(OffloadConfig()).formats == config.formats
    with suppress(ConfigError):
        config.override(OffloadConfig(experts=HqqFormat(nbits=1)))
    make_policy(config.policy)
    if config.formats is not None:
        config.formats.check([4] * 8)


def test_only_errors_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=400)
