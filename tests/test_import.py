"""Importing the package is cheap and touches no device."""

import json
import subprocess
import sys

import transformers_moe_offload as tmo

PUBLIC = [
    "CacheStats", "CapacityError", "CheckpointError", "ConfigError", "ExpertFormats", "HqqFormat", "LayerStats",
    "MoeOffloadError", "OffloadConfig", "OffloadRuntime", "PrefetchConfig", "RecipeError", "UnsupportedModelError",
    "cache_stats", "install", "register_policy", "register_predictor", "restore", "uninstall",
]  # fmt: skip
UPSTREAM = (
    "import transformers.modeling_utils, transformers.generation.utils; from transformers.quantizers import auto;"
)
"""What a program with a model imports anyway."""


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_public_names_are_these():
    assert sorted(tmo.__all__) == sorted(PUBLIC)
    assert all(hasattr(tmo, name) for name in PUBLIC)


def test_importing_adds_little_to_importing_transformers():
    spent = run(
        "import json, time; start = time.process_time();"
        f"{UPSTREAM} theirs = time.process_time(); import transformers_moe_offload;"
        "print(json.dumps({'theirs': theirs - start, 'ours': time.process_time() - theirs}))"
    )
    assert spent["ours"] < spent["theirs"] / 4


def test_importing_touches_no_device_and_loads_no_optional_package():
    seen = run(
        f"import json, sys, torch; {UPSTREAM}"
        "before = set(sys.modules); import transformers_moe_offload;"
        "print(json.dumps({'cuda': torch.cuda.is_initialized(), 'added': sorted(set(sys.modules) - before)}))"
    )
    assert not seen["cuda"]
    added = {name.partition(".")[0] for name in seen["added"]}
    needed = {"transformers", "transformers_moe_offload", "psutil", "_psutil_linux", "numpy"}
    assert added <= needed | sys.stdlib_module_names


def test_importing_reads_no_weights_and_starts_no_threads():
    seen = run(
        "import json, threading; import transformers_moe_offload;"
        "print(json.dumps({'threads': [t.name for t in threading.enumerate()]}))"
    )
    assert seen["threads"] == ["MainThread"]
