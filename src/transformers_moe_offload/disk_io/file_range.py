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


def joined(ranges: Iterable[FileRange]) -> list[FileRange]:
    """The same bytes, with neighbours in a file made one: a checkpoint has an expert's matrices side by side."""
    found: list[FileRange] = []
    for file_range in sorted(ranges, key=lambda file_range: (file_range.file.path, file_range.start)):
        if found and found[-1].file is file_range.file and found[-1].stop == file_range.start:
            found[-1] = found[-1]._replace(stop=file_range.stop)
        else:
            found.append(file_range)
    return found
