"""Importing the package is cheap and touches no device."""

import json
import subprocess
import sys

import pytest

import transformers_moe_offload as tmo

PUBLIC = [
    "CacheAwareConfig", "CacheStats", "CapacityError", "CheckpointError", "ConfigError", "ExpertFormats",
    "HqqFormat", "LayerStats", "MoeOffloadError", "OffloadConfig", "OffloadRuntime", "PrefetchConfig",
    "RecipeError", "UnsupportedModelError", "cache_stats", "install", "quantize_checkpoint", "register_policy",
    "register_predictor", "restore", "uninstall",
]  # fmt: skip
UPSTREAM = "import transformers.modeling_utils, transformers.generation.utils; from transformers.quantizers import auto"
"""What a program with a model imports anyway."""


IMPORT = f"""
import json, sys, threading, time
start = time.process_time()
import torch
{UPSTREAM}
before, theirs = set(sys.modules), time.process_time()
import transformers_moe_offload
ours = time.process_time()
print(json.dumps({{
    "theirs": theirs - start,
    "ours": ours - theirs,
    "cuda": torch.cuda.is_initialized(),
    "added": sorted(set(sys.modules) - before),
    "threads": [thread.name for thread in threading.enumerate()],
}}))
"""


@pytest.fixture
def seen():
    """What a process that imports it sees."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_public_names_are_these():
    assert sorted(tmo.__all__) == sorted(PUBLIC)
    assert all(hasattr(tmo, name) for name in PUBLIC)


def test_importing_adds_little_to_importing_transformers_and_touches_no_device_threads_or_optional_packages(seen):
    assert seen["ours"] < seen["theirs"] / 10
    assert "transformers_moe_offload.hf.model.handle" not in seen["added"], "what runs a model is imported with one"
    assert not seen["cuda"]
    assert seen["threads"] == ["MainThread"]
    added = {name.partition(".")[0] for name in seen["added"]}
    needed = {"transformers", "transformers_moe_offload", "psutil", "_psutil_linux", "numpy"}
    assert added <= needed | sys.stdlib_module_names
