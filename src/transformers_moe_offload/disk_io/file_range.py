"""Bytes of a file that lie in one piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers_moe_offload.disk_io.file import File


class FileRange(NamedTuple):
    """Stored bytes that lie in one piece."""

    file: File
    start: int
    stop: int


def joined(stretches: Iterable[FileRange]) -> list[FileRange]:
    """The same bytes, with neighbours in a file made one: a checkpoint has an expert's matrices side by side."""
    found: list[FileRange] = []
    for stretch in sorted(stretches, key=lambda stretch: (stretch.file.path, stretch.start)):
        if found and found[-1].file is stretch.file and found[-1].stop == stretch.start:
            found[-1] = found[-1]._replace(stop=stretch.stop)
        else:
            found.append(stretch)
    return found
