"""`adapter_config.json` of a LoRA adapter, and the front matter of a model card."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import damaged, mutated
from transformers_moe_offload.builder.licences import judged, licence_of
from transformers_moe_offload.builder.sources.adapter import read_config
from transformers_moe_offload.models.adapter_moe.adapter_folders import rank_of, scaling

_CONFIG = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4, r"layers\.\d+\.up": 2}, "bias": "none",
    "alpha_pattern": {".*down_proj": 3.5}, "use_rslora": True, "init_lora_weights": True, "modules_to_save": None,
    "target_modules": ["q_proj"], "base_model_name_or_path": "me/base",
}  # fmt: skip
_CARD = {"license": "other", "license_name": "mine", "license_link": "https://x", "tags": ["a"], "datasets": ["b"]}
_PATTERNS = ["(a+)+$", "(a|a)*b", "[", ".*.*.*.*.*x", "(?=a)", "(?P<a>", "a{1,9999}", r"(\w+\.)*x", "(x|y)(x|y)" * 50]
_TOKENS = (b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"(a+)+$", b"*a", b"&a", b"---\n", b"!!set {a}", b"\xff")
_PATH = "model.layers.0." + "a" * 60 + ".self_attn.q_proj"


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    while True:
        kind = rng.random()
        if kind < 0.6:
            config = mutated(rng, _CONFIG, {"r": 0, "rank_pattern": {"(a+)+$": 2}, "use_dora": True})
            if isinstance(config, dict) and rng.random() < 0.3:
                config["rank_pattern"] = {rng.choice(_PATTERNS): 2 for _ in range(3)}
            yield "adapter", json.dumps(config).encode("utf-8", "surrogatepass")
        elif kind < 0.7:
            yield "adapter", damaged(rng, json.dumps(_CONFIG).encode(), _TOKENS)
        elif kind < 0.85:
            yield "card", f"---\n{json.dumps(mutated(rng, _CARD))}\n---\n# x\n".encode("utf-8", "replace")
        else:
            yield "card", damaged(rng, f"---\n{yaml.safe_dump(_CARD)}---\n# x\n".encode(), _TOKENS)


def run(case: tuple[str, bytes]) -> None:
    kind, content = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "card":
            (folder / "README.md").write_bytes(content)
            judged([licence_of("a", folder / "README.md"), licence_of("b", None)])
            return
        (folder / "adapter_config.json").write_bytes(content)
        config = read_config(folder)
        assert rank_of(config, _PATH) > 0
        assert scaling(config, _PATH) > 0


def test_only_errors_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=300)
