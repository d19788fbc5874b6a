"""What an expert's gate is calibrated with: prompts, a text file, JSON lines, or a data set from the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers_moe_offload.builder.recipe import Dataset, Expert
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import one_line, parse_json, quoted

_PIECE_CHARACTERS = 16384
"""A text file is read in pieces of about this length, so that only the needed beginning of a long one is read."""

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Texts:
    """Texts of one expert."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    dataset: Dataset | None = None
    """More positive texts."""

    @classmethod
    def of(cls, expert: Expert, number: int) -> Texts:
        """The texts of an expert, under its name in reports."""
        return cls(name_of(expert, number), expert.positive_prompts, expert.negative_prompts, expert.dataset)

    @property
    def is_empty(self) -> bool:
        """Whether the expert has neither a data set nor a text other than blanks."""
        return not any(text.strip() for text in self.positive) and self.dataset is None


def name_of(expert: Expert, number: int) -> str:
    """What an expert is called."""
    return expert.name or (str(expert.source) if expert.source is not None else f"expert {number}")


def expect_texts(texts: Sequence[Texts], mode: str) -> None:
    """Refuse experts without texts, and two experts with the same texts."""
    for expert in texts:
        if expert.is_empty:
            raise RecipeError(
                f"gate mode {quoted(mode)} reads text, but expert {quoted(expert.name)} has neither positive_prompts "
                "that say something nor a dataset; give it some, or set gate.mode to random, noise or gateless"
            )
    seen: dict[object, str] = {}
    for expert in texts:
        same = (expert.positive, expert.negative, expert.dataset)
        if same in seen:
            raise RecipeError(
                f"experts {quoted(seen[same])} and {quoted(expert.name)} have the same texts, so no gate can tell "
                "them apart; give them texts of their own, or set gate.mode to random, noise or gateless"
            )
        seen[same] = expert.name


def expect_files(experts: Sequence[Expert]) -> None:
    """Refuse a data set that is named like a file and does not exist, before anything is read."""
    for number, expert in enumerate(experts):
        if expert.dataset is not None and Path(expert.dataset.path).suffix and not Path(expert.dataset.path).exists():
            raise RecipeError(
                f"expert {quoted(name_of(expert, number))} has the dataset {expert.dataset.path}, and there is no "
                "such file; paths in a recipe count from the recipe's folder"
            )


def read_dataset(dataset: Dataset) -> Iterator[str]:
    """The texts of a data set, one at a time, as many as the caller takes."""
    path = Path(dataset.path)
    if path.is_dir() or not (path.is_file() or path.suffix):
        yield from _from_datasets(dataset)
    elif path.suffix in _JSON_LINES:
        yield from _json_lines(path, dataset.text)
    elif path.suffix in (".parquet", ".csv", ".arrow"):
        raise RecipeError(
            f"dataset {dataset.path} is neither text nor JSON lines ({' or '.join(_JSON_LINES)}); convert it, or name "
            f"the folder or the id on the Hub that `datasets.load_dataset` reads"
        )
    else:
        yield from _pieces(path)


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as stream:
            while lines := stream.readlines(_PIECE_CHARACTERS):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the text file {path}: {error}") from error


def _json_lines(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield _field(parse_json(line, place, RecipeError), column, place)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read JSON lines from {path}: {error}") from error


def _from_datasets(dataset: Dataset) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RecipeError(
            f"dataset {dataset.path} is not a file here, and data sets of the Hub need the package `datasets`: "
            f"pip install 'transformers-moe-offload[datasets]'"
        ) from error
    try:
        rows = load_dataset(dataset.path, split=dataset.split)
    except Exception as error:  # whatever the builder of a data set raises
        raise RecipeError(
            f"cannot load dataset {dataset.path}, split {quoted(dataset.split)}: {type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(rows):
        yield _field(row, dataset.text, f"{dataset.path}, row {number}")


def _field(row: object, column: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        known = one_line(", ".join(map(str, row))) if isinstance(row, dict) else type(row).__name__
        raise RecipeError(f"{place} has no text in column {quoted(column)} but {known}; set dataset.text")
    text = row[column]
    assert isinstance(text, str)
    return text
