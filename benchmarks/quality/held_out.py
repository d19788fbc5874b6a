"""The text that the small models were trained and tested on, as windows of tokens, and what a model loses on them.

Collected and split by the scripts of `examples/models`; 80 windows of held-out text are those of its `evaluate.py`.
"""

# B windows, S positions

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from benchmarks import TINY_MOE

sys.path.append(str(TINY_MOE.parent))

from corpus import collect
from sources import DOMAINS
from train_tokenizer import CONTEXT, packed

LENGTH = CONTEXT
"""Tokens of a window, as many as the model was trained on."""

SEARCHED_FILES = 40
"""Files of each domain's training text that windows are taken from; files are in the order of a hash."""


@dataclass(frozen=True)
class Text:
    """Windows of each domain, one domain after the other, as many of each."""

    held_out: Tensor
    """(B, S) int64, like `trained`."""
    trained: Tensor
    origin: str
    """Whose text it is."""

    def by_domain(self, losses: Tensor) -> dict[str, Tensor]:
        """losses (B,) of held-out windows -> those of each domain, and of all."""
        return dict(zip(DOMAINS, losses.chunk(len(DOMAINS)), strict=True)) | {"all": losses}


def load_text(path: Path | None, *, held_out: int, trained: int, length: int, files: slice = slice(None)) -> Text:
    """So many windows of each domain, evenly spread over a `texts.json` of `corpus.py`, or over this machine's text.

    `files` are those of the held-out ones of each domain that windows are taken from.
    """
    texts = collect() if path is None else json.loads(path.read_text())
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)

    def windows(domain: str, split: str, files: list[str], count: int) -> Tensor:
        ids = torch.from_numpy(packed(tokenizer, files).astype("int64")) if files else torch.empty(0)
        whole = ids[: len(ids) // length * length].view(-1, length)
        if len(whole) < count:
            raise typer.BadParameter(
                f"{domain} text that was {split} has {len(whole)} windows of {length} tokens, and {count} are asked "
                f"for; ask for fewer, or pass the texts.json of a machine with more documentation as --text"
            )
        return whole[torch.linspace(0, len(whole) - 1, count, dtype=torch.float64).long()]

    return Text(
        torch.cat([windows(d, "held out", texts[d]["held_out"][files], held_out) for d in DOMAINS]),
        torch.cat([windows(d, "trained on", texts[d]["train"][:SEARCHED_FILES], trained) for d in DOMAINS]),
        _origin(texts),
    )


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> Tensor:
    """Mean nats per predicted token of each window; the first one is context only. windows (B, S) -> (B,) float64."""
    found = []
    for part in windows.split(8):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        nats = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(nats.view(len(part), -1).double().mean(1))
    return torch.cat(found)


def _origin(texts: dict[str, dict[str, list[str]]]) -> str:
    """Whether held-out text is that of the models' own manifest."""
    manifest = json.loads((TINY_MOE.parent / "manifest.json").read_text())
    sums = {domain: hashlib.sha256("\0".join(texts[domain]["held_out"]).encode()).hexdigest() for domain in DOMAINS}
    if all(manifest[domain]["held_out"]["sha256"] == found for domain, found in sums.items()):
        return "that of examples/models/manifest.json"
    return "another than that of examples/models/manifest.json, so figures differ a little from those of other machines"
