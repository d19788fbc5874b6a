"""The licence of a mixture, from what the cards of its sources say; and whether those licences exclude each other.

Decides from identifiers alone, by a table of their kinds, and errs on the side of caution: licences that are not in it
are reported as unknown. This is bookkeeping and no legal advice; the publisher has the last word (`hub.license`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import one_line, parse_yaml

PERMISSIVE, COPYLEFT, NON_COMMERCIAL, COMMUNITY, NO_DERIVATIVES, UNKNOWN = (
    "permissive",
    "copyleft",
    "non-commercial",
    "community",
    "no-derivatives",
    "unknown",
)

_PERMISSIVES = (
    "cc0-1.0", "unlicense", "wtfpl", "pddl", "mit", "isc", "zlib", "ncsa", "postgresql", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "afl-3.0", "ms-pl", "openmdw-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "odc-by", "etalab-2.0", "ecl-2.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "artistic-2.0", "apache-2.0",
)  # fmt: skip
"""From the least demanding to the most demanding: a mixture of two is under the later one, whose conditions on notices
are at least those of the other."""

_COPYLEFT: Mapping[str, tuple[str, ...]] = {
    "mpl-2.0": ("gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    "lgpl-2.1": ("gpl-2.0", "gpl-3.0"),
    "lgpl-3.0": ("gpl-3.0", "agpl-3.0"),
    "lgpl": (),
    "gpl": (),
    "gpl-2.0": (),
    "gpl-3.0": ("agpl-3.0",),
    "agpl-3.0": (),
    "cc-by-sa-3.0": ("cc-by-sa-4.0",),
    "cc-by-sa-4.0": ("gpl-3.0",),
    "eupl-1.2": ("gpl-3.0", "agpl-3.0"),
    "osl-3.0": (),
    "odbl": (),
    "cdla-sharing-1.0": (),
}
"""Licence -> others that something under it may be passed on under, as part of a whole: what the FSF (license list,
gnu.org), Creative Commons (compatible licenses) and the EUPL's appendix say."""

_NON_COMMERCIAL = (
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "fair-noncommercial-research-license", "intel-research",
    "h-research", "apple-amlr", "deepfloyd-if-license",
)  # fmt: skip
_NON_COMMERCIAL_ALIKE = ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0")
_NO_DERIVATIVES = ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")
_COMMUNITY = (
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "openrail++",
    "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
    "grok2-community",
)  # fmt: skip
"""Works under them may be used and changed freely, within limits that have to be passed on."""

_NOTICES = {
    "llama": "Built with Llama. The Llama licence asks for this notice, for a copy of the licence, and for a name of "
    "the model that begins with Llama.",
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
}
"""The notice that a licence requires, by the beginning of its identifier."""

_WITHOUT_APACHE = ("gpl-2.0",)
"""Licences that exclude Apache 2.0: its patent clause counts as a further restriction."""

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
        """What sort of licence it is; UNKNOWN for those that are not in the table."""
        if self.id in _PERMISSIVES:
            return PERMISSIVE
        if self.id in _COPYLEFT or self.id in _NON_COMMERCIAL_ALIKE:
            return COPYLEFT
        if self.id in _NON_COMMERCIAL:
            return NON_COMMERCIAL
        if self.id in _NO_DERIVATIVES:
            return NO_DERIVATIVES
        return COMMUNITY if self.id in _COMMUNITY else UNKNOWN

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
        text for start, text in _NOTICES.items() if any((one.id or "").startswith(start) for one in licences)
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
    if one.id in _WITHOUT_APACHE and other.id == "apache-2.0":
        return f"{one} counts the patent clause of {other} as a further restriction"
    if one.kind != COPYLEFT or one.id is None:
        return None
    if other.kind == COPYLEFT:
        assert other.id is not None
        if other.id in _passed_on(one.id) or one.id in _passed_on(other.id):
            return None
        return "both require the whole work to be under themselves"
    if other.kind == COMMUNITY or (other.kind == NON_COMMERCIAL and one.id not in _NON_COMMERCIAL_ALIKE):
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
        return max(distinct, key=lambda one: _PERMISSIVES.index(str(one.id))).id, None, None
    if len(demanding) == 1 and demanding[0].kind != UNKNOWN:
        return demanding[0].id, demanding[0].name, demanding[0].link
    for one in demanding if len(demanding) > 1 else ():
        rest = [other for other in demanding if other is not one]
        if all(other.kind == COPYLEFT and one.id in _passed_on(str(other.id)) for other in rest):
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


def _passed_on(id: str) -> tuple[str, ...]:
    """Other copyleft licences that something under this one may be passed on under."""
    if id in _NON_COMMERCIAL_ALIKE:
        return _NON_COMMERCIAL_ALIKE[_NON_COMMERCIAL_ALIKE.index(id) :]
    return _COPYLEFT[id]
