"""The small trained model with larger experts that compute the same: real text and real routing, and much to read.

Every expert has each of its inner neurons several times, each copy with a part of its output weight. So the model
writes what the small one writes, but for rounding, and its experts take so many times the bytes and the arithmetic.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def widened(folder: Path, times: int, made: Path) -> Path:
    """The folder of a Qwen3-MoE whose experts have `times`, a power of two, the inner neurons of those in `folder`; it
    is made if it is not there."""
    made_folder = made / f"{folder.name}-{times}-times"
    if made_folder.exists():
        return made_folder
    unfinished = made_folder.with_name(f"{made_folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folder, unfinished)
    config = json.loads((unfinished / "config.json").read_text())
    config["moe_intermediate_size"] *= times
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in sorted(unfinished.glob("*.safetensors")):
        save_file({name: _wider(name, one, times) for name, one in load_file(file).items()}, file, {"format": "pt"})
    return unfinished.rename(made_folder)


def _wider(name: str, tensor: Tensor, times: int) -> Tensor:
    """One tensor of the checkpoint; the copies follow one another as a whole, so that a group of weights that is
    quantized together has as many different ones as before."""
    if ".experts." not in name:
        return tensor
    if name.endswith(".down_proj.weight"):  # (H, I)
        return (tensor / times).repeat(1, times)
    return tensor.repeat(times, 1)  # (I, H)
