"""The licence of a mixture, from what the cards of its sources say; and whether those licences exclude each other.

Decides from identifiers alone, and errs on the side of caution: licences that are not in `table.py` are reported as
unknown. This is bookkeeping and no legal advice; the publisher has the last word (`hub.license`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.licences.table import (
    COMMUNITY,
    COPYLEFT,
    NO_DERIVATIVES,
    NON_COMMERCIAL,
    NON_COMMERCIAL_ALIKE,
    NOTICES,
    PERMISSIVE,
    PERMISSIVES,
    UNKNOWN,
    WITHOUT_APACHE,
    kind_of,
    passed_on,
)
from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import one_line, parse_yaml

_MAX_CARD = 1_000_000
"""Characters of a card that are read; its metadata is at the beginning."""


@dataclass(frozen=True)
class Licence:
    """What a source's card says of its licence."""

    source: str
    id: str | None
    """As the Hub writes it: `apache-2.0`; None where there is no card, or it names no licence."""
    name: str | None = None
    """Name of a licence without an identifier on the Hub."""
    link: str | None = None

    @property
    def kind(self) -> str:
        """What sort of licence it is."""
        return kind_of(self.id)

    def __str__(self) -> str:
        return self.name if self.id == "other" and self.name else self.id or "no licence"


@dataclass(frozen=True)
class Verdict:
    """The licence of a mixture."""

    id: str | None
    """For the card: one of the Hub's identifiers, `other`, or None if nothing is known."""
    name: str | None
    link: str | None
    conflicts: tuple[str, ...]
    """Pairs of licences that exclude each other, in sentences."""
    warnings: tuple[str, ...]
    """The conflicts, unknown licences, and limits that hold together; empty with `level="off"`."""
    notices: tuple[str, ...]
    """Notices that the licences require."""
    sources: tuple[Licence, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def licence_of(source: str, card: Path | None) -> Licence:
    """The licence that a card names; none if the card is missing or cannot be read."""
    if card is None:
        return Licence(source, None)
    try:
        with card.open(encoding="utf-8") as stream:
            data = parse_yaml(_front_matter(stream.read(_MAX_CARD)), str(card), RecipeError)
    except (ValueError, OSError):  # a RecipeError is a ValueError
        return Licence(source, None)
    if not isinstance(data, dict):
        return Licence(source, None)
    found = data.get("license")
    if isinstance(found, list):  # older cards
        found = found[0] if len(found) == 1 else None
    known = one_line(found, 100).lower() if isinstance(found, str) and found.strip() else None
    name, link = (_text(data.get(key)) for key in ("license_name", "license_link"))
    return Licence(source, None if known == "unknown" else known, name, link)


def _front_matter(card: str) -> str:
    """The text between the first two lines of dashes, if a card begins with one; else empty."""
    lines = card.lstrip().splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return ""
    return "\n".join(lines[1 : lines.index("---", 1)])


def _text(value: Any) -> str | None:
    return one_line(value) if isinstance(value, str) and value else None


def verdict_of(ancestors: Iterable[Ancestor], recipe: MoeRecipe) -> Verdict:
    """The licence of what a recipe makes of these checkpoints, by their cards."""
    licences = [licence_of(one.name, one.card) for one in ancestors]
    return judged(licences, recipe.checks.licence, recipe.hub.license)


def judged(licences: Sequence[Licence], level: str = "error", override: str | None = None) -> Verdict:
    """The licence of a work that is made of all these sources.

    `level` says what becomes of conflicts: an `error` (`RecipeError`), a `warn`ing, or nothing (`off`). `override` is
    the licence that the publisher has settled on; conflicts are looked for all the same.
    """
    conflicts = tuple(_conflicts(licences))
    if conflicts and level == "error":
        raise RecipeError(
            f"licences exclude each other: {'; '.join(conflicts)}. Take other sources, or, if you may pass the mixture "
            f"on all the same, set checks.licence to warn"
        )
    warnings = () if level == "off" else (*conflicts, *_unknown(licences), *_mixed(licences))
    id, name, link = (override, None, None) if override else _of_the_whole(licences)
    notices = tuple(
        text for start, text in NOTICES.items() if any((one.id or "").startswith(start) for one in licences)
    )
    return Verdict(id, name, link, conflicts, warnings, notices, tuple(licences))


def _conflicts(licences: Sequence[Licence]) -> Iterable[str]:
    distinct = _distinct(licences)
    for one in distinct:
        if one.kind == NO_DERIVATIVES:
            yield f"{one} of {one.source} allows no derivatives to be passed on, and a mixture is one"
    for one, other in combinations(distinct, 2):
        reason = _exclusion(one, other) or _exclusion(other, one)
        if reason:
            yield f"{one} of {one.source} and {other} of {other.source} ({reason})"


def _exclusion(one: Licence, other: Licence) -> str | None:
    """Why the first licence excludes the second; None if it does not."""
    if one.id in WITHOUT_APACHE and other.id == "apache-2.0":
        return f"{one} counts the patent clause of {other} as a further restriction"
    if one.kind != COPYLEFT or one.id is None:
        return None
    if other.kind == COPYLEFT:
        assert other.id is not None
        if other.id in passed_on(one.id) or one.id in passed_on(other.id):
            return None
        return "both require the whole work to be under themselves"
    if other.kind == COMMUNITY or (other.kind == NON_COMMERCIAL and one.id not in NON_COMMERCIAL_ALIKE):
        return f"{one} requires the whole work to be under it, and {other} adds restrictions"
    return None


def _of_the_whole(licences: Sequence[Licence]) -> tuple[str | None, str | None, str | None]:
    """Identifier, name and link for the card."""
    distinct = _distinct(licences)
    if not distinct or all(one.id is None for one in distinct):
        return None, None, None
    if len({(one.id, one.name) for one in distinct}) == 1:
        return distinct[0].id, distinct[0].name, distinct[0].link
    demanding = [one for one in distinct if one.kind != PERMISSIVE]
    if not demanding:
        return max(distinct, key=lambda one: PERMISSIVES.index(str(one.id))).id, None, None
    if len(demanding) == 1 and demanding[0].kind != UNKNOWN:
        return demanding[0].id, demanding[0].name, demanding[0].link
    for one in demanding if len(demanding) > 1 else ():
        rest = [other for other in demanding if other is not one]
        if all(other.kind == COPYLEFT and one.id in passed_on(str(other.id)) for other in rest):
            return one.id, None, None
    return "other", " and ".join(sorted(str(one) for one in distinct)), None


def _unknown(licences: Sequence[Licence]) -> Iterable[str]:
    names = list(dict.fromkeys(f"{one.source} ({one})" for one in licences if one.kind == UNKNOWN))
    if names:
        yield (
            f"the licence of {', '.join(names)} is not known to us; find out what it asks for before you publish the "
            f"mixture, and set hub.license"
        )


def _mixed(licences: Sequence[Licence]) -> Iterable[str]:
    limited = [one for one in _distinct(licences) if one.kind in (COMMUNITY, NON_COMMERCIAL)]
    if len({_family(one) for one in limited}) > 1:
        yield (
            f"{' and '.join(map(str, limited))} all hold for the mixture at once; its users are bound by each of them"
        )


def _family(licence: Licence) -> str:
    return "llama" if str(licence).startswith("llama") else str(licence)


def _distinct(licences: Sequence[Licence]) -> list[Licence]:
    """One of each licence, in the order in which they come."""
    return list({(one.id, one.name): one for one in reversed(licences)}.values())[::-1]
