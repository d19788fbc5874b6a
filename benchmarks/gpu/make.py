"""Make one of the models of `models.py`, if it is not there, with as many layers as this machine holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoConfig

from benchmarks.gpu.models import PUBLISHED, QUICK, blueprint, layers_that_fit, make
from transformers_moe_offload.hf.prebuilt.layout import MARKS
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.output.claim import is_complete


def make_model(folder: str, model: str, nbits: int) -> dict[str, Any]:
    """What was made: how many of the layers there are, and their bytes."""
    published, path = (PUBLISHED | QUICK)[model], Path(folder)
    all_layers = published.config().num_hidden_layers
    if is_complete(path, MARKS) or (path / MARKS.first).exists():
        layers = _layers_of(path, published)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk_bytes = shutil.disk_usage(path.parent).free
        layers = layers_that_fit(published, nbits, psutil.virtual_memory().total, disk_bytes)
    quantization, _ = blueprint(published, nbits, layers)
    sizes = Sizes.of(quantization)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task(f"making {model}", total=None)
        make(path, published, nbits, layers, device, lambda nbytes: bars.advance(task, nbytes))
    return {
        "layers": layers,
        "all_layers": all_layers,
        "experts": sizes.num_experts,
        "expert_bytes": sizes.expert_bytes,
        "dense_bytes": sizes.dense_bytes,
        "experts_per_token": AutoConfig.from_pretrained(path).num_experts_per_tok,
    }


def _layers_of(path: Path, published: Any) -> int:
    """Of one that is there, or was begun."""
    stored = json.loads((path / MARKS.first).read_text())["published"]
    return int(stored["num_hidden_layers"])
