"""Run another program with this package imported, so that it knows `moe_offload=`.

    python -m transformers_moe_offload lm_eval --model hf --model_args pretrained=...,moe_offload=auto --tasks ...
    accelerate launch -m transformers_moe_offload lm_eval ...

Transformers loads no plugins by itself, and programs such as lm-evaluation-harness have no place to name one. The first
argument is a module, as after `python -m`; the rest is its own. The harness also learns a type of model, `hf-reuse`
(`routing/harness.py`).
"""

import importlib.util
import runpy
import sys

import transformers_moe_offload  # noqa: F401  importing installs

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m transformers_moe_offload MODULE [ARGUMENT]...  (runs it with the plugin imported)")
    sys.argv = sys.argv[1:]
    package = sys.argv[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        sys.exit(f"there is no module {package} in this environment; install it, or correct the name")
    if package == "lm_eval":
        importlib.import_module("lm_eval.models")  # its own entries, which it adds by itself only to an empty registry
        from lm_eval.api.registry import model_registry

        model_registry.register("hf-reuse", target="transformers_moe_offload.routing.harness:ReuseOrderedLM")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
