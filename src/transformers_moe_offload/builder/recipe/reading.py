"""Read a recipe's values strictly: an unknown key is an error with a suggestion, and every error says where.

The classes themselves check their values; this file makes them from mappings, lists and texts, and turns them back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from transformers_moe_offload.builder.recipe.origin import Dataset, Origin
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.untrusted import parse_yaml, quoted

T = TypeVar("T")

_PATHS = {"Origin": ("model", "adapter"), "Dataset": ("path",), "MoeRecipe": ("tokenizer",)}
"""By class, the fields that may name a folder or a file."""


@dataclass(frozen=True)
class Place:
    """Where in a file a value is, and which folder its paths are relative to."""

    name: str = ""
    folder: Path | None = None

    def at(self, step: str) -> Place:
        """One level further in."""
        return replace(self, name=f"{self.name}.{step}".lstrip("."))

    def error(self, message: str) -> RecipeError:
        """An error that says where."""
        return RecipeError(f"{self.name}: {message}" if self.name else message)

    def resolved(self, name: str) -> str:
        """The path of a folder or file relative to `folder`; anything else, such as an id on the Hub, as it is."""
        if self.folder is None or Path(name).is_absolute():
            return name
        path = self.folder / name
        return str(path) if os.path.exists(path) or name.startswith((".", "~")) else name


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not valid YAML: it is not text in UTF-8") from error
    values = parse_yaml(text, str(path), RecipeError)
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}, not a mapping"
        raise RecipeError(f"{path} {what}; see the documentation for what a recipe says")
    return values


def expect_known(names: Sequence[Any], known: Sequence[str], place: Place) -> None:
    """Refuse the first name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f"; known are {', '.join(known)}")
            raise place.error(f"unknown key {quoted(name)}{hint}")


def read(cls: type[T], values: Any, place: Place) -> T:
    """One of a recipe's classes from a mapping; an `Origin` also from a text, a `Dataset` from a path."""
    if isinstance(values, cls):
        return values
    if isinstance(values, str) and cls in (Origin, Dataset):
        return _checked(place, _from_text, cls, values, place)
    if not isinstance(values, Mapping):
        raise place.error(f"{quoted(values)} is not a mapping of {', '.join(field.name for field in fields(cls))}")  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    expect_known(list(values), list(hints), place)
    for field in fields(cls):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise place.error(f"{field.name} is missing")
    options = {name: _value(hints[name], value, place.at(name)) for name, value in values.items()}
    return _checked(place, _with_paths, cls, options, place)


def as_plain(owner: Any) -> Any:
    """A recipe's value as mappings, lists and texts, without values that equal their defaults."""
    if isinstance(owner, tuple):
        return [as_plain(value) for value in owner]
    if not is_dataclass(owner):
        return owner
    plain = {}
    for field in fields(owner):
        value = getattr(owner, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            plain[field.name] = as_plain(value)
    return plain


def _value(kind: Any, value: Any, place: Place) -> Any:
    """A value, converted to the type of its field."""
    options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if is_dataclass(option):
            return read(option, value, place)  # type: ignore[arg-type]
        if get_origin(option) is tuple:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise place.error(f"{quoted(value)} is not a list")
            return tuple(_value(get_args(option)[0], one, place.at(str(index))) for index, one in enumerate(value))
        if option is float and type(value) in (int, float):
            return value
    if type(value) not in options:
        names = " or ".join("nothing" if option is type(None) else option.__name__ for option in options)
        raise place.error(f"{quoted(value)} is not of type {names}")
    return value


def _from_text(cls: Any, text: str, place: Place) -> Any:
    if cls is Dataset:
        return Dataset(path=place.resolved(text))
    if place.folder is not None and os.path.isdir(place.folder / text):
        return Origin(model=place.resolved(text))
    return _with_paths(cls, vars(Origin.parse(text)), place)


def _with_paths(cls: Any, options: dict[str, Any], place: Place) -> Any:
    """The class with its options; names of folders and files among them are relative to the recipe's folder."""
    paths = _PATHS.get(cls.__name__, ())
    resolved = {name: place.resolved(value) for name, value in options.items() if name in paths and value is not None}
    return cls(**options | resolved)


def _checked(place: Place, make: Any, *args: Any) -> Any:
    """Call `make`; a `RecipeError` that it raises says where in the file."""
    try:
        return make(*args)
    except RecipeError as error:
        if place.name and not str(error).startswith(place.name):
            raise place.error(str(error)) from error
        raise
