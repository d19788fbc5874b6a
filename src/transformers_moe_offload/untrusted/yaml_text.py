"""Read untrusted YAML: text, numbers, lists and mappings only, as in JSON.

PyYAML's safe loader runs no code, but a few hundred bytes can expand to a billion values through aliases, a duplicate
key silently replaces the first, sets, dates and bytes are made, and invalid values raise various Python exceptions.
"""

from __future__ import annotations

from typing import Any

import yaml

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.untrusted.json_text import MAX_DEPTH
from transformers_moe_offload.untrusted.messages import one_line, quoted

MAX_CHARACTERS = 500_000
"""Longest text."""
MAX_VALUES = 25_000
"""Most values in a text. PyYAML reads about 15,000 in a second."""
MAX_EXPANDED = 10_000
"""Most values that a text with aliases may expand to. A text without aliases does not expand."""
_PREFIX = "tag:yaml.org,2002:"
_KINDS = ("str", "int", "float", "bool", "null", "seq", "map", "merge")
_RAISED = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors that PyYAML 6.0 raises, also for invalid values: `!!int x`, `!!bool x`, `!!float ''`, escapes beyond
Unicode."""


def parse_yaml(text: str, what: str, error: type[MoeOffloadError]) -> Any:
    """The value of a text. `what` names the text in the error that invalid YAML raises."""
    if len(text) > MAX_CHARACTERS:
        raise error(f"{what} has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as cause:
        raise error(f"{what} is not valid YAML: it is nested too deeply") from cause
    except _RAISED as cause:
        raise error(f"{what} is not valid YAML: {one_line(cause)}") from cause


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, limited in size, depth and kinds of values."""

    yaml_implicit_resolvers = {  # noqa: RUF012  dates and "=" are read as text
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_PREFIX}timestamp", f"{_PREFIX}value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        """The root node of the text, after checking how many values its aliases expand to."""
        node = super().get_single_node()
        if node is not None and (size := _expanded_size(node)) > max(MAX_EXPANDED, len(self._distinct)):
            raise yaml.composer.ComposerError(
                None, None, f"its aliases stand for {size:,} values, and at most {MAX_EXPANDED:,} are made", None
            )
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The node of one value; raises `ComposerError` for a kind that JSON does not have."""
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {MAX_DEPTH} levels deep", None)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        self._distinct.add(id(node))
        if len(self._distinct) > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"it has more than {MAX_VALUES:,} values", None)
        if node.tag not in [_PREFIX + kind for kind in _KINDS]:
            raise yaml.composer.ComposerError(None, None, f"{quoted(node.tag)} is not supported", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """The node of a mapping; its keys must be scalars without duplicates."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key is not text", key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{quoted(key.value)} is there twice", key.start_mark)
            seen.add(key.value)
        return node

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._distinct: set[int] = set()


def _expanded_size(root: Any) -> int:
    """How many values a graph of nodes expands to: each node counts as often as it is referred to.

    Raises `ComposerError` if a value contains itself.
    """
    sizes: dict[int, int | None] = {}

    def size_of(node: Any) -> int:
        found = sizes.get(id(node), 0)
        if found is None:
            raise yaml.composer.ComposerError(None, None, "a value holds itself", node.start_mark)
        if not found:
            sizes[id(node)] = None
            inner = () if isinstance(node, yaml.ScalarNode) else node.value
            children = (child for one in inner for child in (one if isinstance(one, tuple) else (one,)))
            found = sizes[id(node)] = 1 + sum(map(size_of, children))
        return found

    return size_of(root)
