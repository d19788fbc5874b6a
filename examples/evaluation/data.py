"""Hand the texts beside this file to lm-evaluation-harness, wherever it was started."""

import json
from pathlib import Path

from datasets import Dataset


def texts(domain: str, **_: object) -> dict[str, Dataset]:
    """The documents of one domain, as the harness expects a data set."""
    lines = (Path(__file__).parent / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def prose(**options: object) -> dict[str, Dataset]:
    return texts("prose", **options)


def python(**options: object) -> dict[str, Dataset]:
    return texts("python", **options)


def continuations(**_: object) -> dict[str, Dataset]:
    """The first half of each document, and which of four next bits is its own: the others are of its neighbours."""
    rows = []
    for domain in ("prose", "python"):
        halves = [_halves(row["text"]) for row in texts(domain)["test"]]
        for number, (first, _) in enumerate(halves):
            choices = [halves[(number + step) % len(halves)][1] for step in range(4)]
            place = number % 4  # of its own one, so that no place is right more often than others
            choices[0], choices[place] = choices[place], choices[0]
            rows.append({"first": first, "choices": choices, "own": place})
    return {"test": Dataset.from_list(rows)}


def _halves(text: str, length: int = 100) -> tuple[str, str]:
    """Cut where a word begins; `length` characters of what follows, the space among them."""
    cut = text.index(" ", len(text) // 2)
    return text[:cut], text[cut : cut + length]
