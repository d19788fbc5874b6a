"""A file in which every window is kept as soon as it has been measured, so that a measurement can go on later.

A line of JSON that says what is measured, then a line for each window and strength. A last line that was cut off by an
interruption is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.meter.steps import Steps
from transformers_moe_offload.tensor_files.writer import write_text
from transformers_moe_offload.untrusted import parse_json, quoted, reading


class Journal:
    """The steps that have been measured, by window and strength; in a file, if one is given."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        """`facts` say what is measured. Raises `ConfigError` if the file is of another measurement or of none."""
        self._path = path
        self._steps: dict[tuple[int, float], Steps] = {}
        if path is None:
            return
        facts = json.loads(json.dumps(facts))
        if path.exists():
            with reading(f"cannot read resume={path}"):
                first, *lines = path.read_text(encoding="utf-8").split("\n")
            self._expect(path, first, facts)
            for number, line in enumerate(lines[:-1], start=2):  # what follows the last line break is empty or cut off
                self._take(path, number, line)
        kept = [json.dumps(facts), *(_line(*key, steps) for key, steps in self._steps.items())]
        write_text(path, "\n".join(kept) + "\n")

    def get(self, window: int, strength: float) -> Steps | None:
        """The steps of a window at a strength, if they have been measured."""
        return self._steps.get((window, strength))

    def add(self, window: int, strength: float, steps: Steps) -> None:
        """Keep the steps of a window at a strength."""
        self._steps[window, strength] = steps
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(window, strength, steps) + "\n")

    @staticmethod
    def _expect(path: Path, first: str, facts: Mapping[str, Any]) -> None:
        """Raise unless the first line says that the same is measured."""
        found = parse_json(first, f"resume={path}", ConfigError)
        if not isinstance(found, dict) or "meter" not in found:
            raise ConfigError(f"resume={path} is not a file that a measurement was kept in; name another one")
        for name, value in facts.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"resume={path} is of another measurement: its {name} is {quoted(found.get(name))}, and now it is "
                    f"{quoted(value)}; name another file, or remove this one"
                )

    def _take(self, path: Path, number: int, line: str) -> None:
        """Take the steps of a line."""
        found = parse_json(line, f"line {number} of resume={path}", ConfigError)
        try:
            steps = Steps(*(np.array(found[name], np.float64) for name in Steps._fields))
            key = int(found["window"]), float(found["strength"])
            is_whole = len({values.shape for values in steps}) == 1 and steps.nats.ndim == 1
        except (KeyError, TypeError, ValueError, OverflowError):
            is_whole = False
        if not is_whole:
            raise ConfigError(f"line {number} of resume={path} holds no steps of a window; remove the file")
        self._steps[key] = steps


def _line(window: int, strength: float, steps: Steps) -> str:
    values = {name: list(map(float, value)) for name, value in steps._asdict().items()}
    return json.dumps({"window": window, "strength": strength} | values)
