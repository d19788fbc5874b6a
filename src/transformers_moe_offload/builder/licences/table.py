"""The kind of licence behind each of the Hub's identifiers, and the licences that works under it may be passed on
under."""

from __future__ import annotations

from collections.abc import Mapping

PERMISSIVE, COPYLEFT, NON_COMMERCIAL, COMMUNITY, NO_DERIVATIVES, UNKNOWN = (
    "permissive",
    "copyleft",
    "non-commercial",
    "community",
    "no-derivatives",
    "unknown",
)

PERMISSIVES = (
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
NON_COMMERCIAL_ALIKE = ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0")
_NO_DERIVATIVES = ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")
_COMMUNITY = (
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "openrail++",
    "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
    "grok2-community",
)  # fmt: skip
"""Works under them may be used and changed freely, within limits that have to be passed on."""

NOTICES = {
    "llama": "Built with Llama. The Llama licence asks for this notice, for a copy of the licence, and for a name of "
    "the model that begins with Llama.",
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
}
"""The notice that a licence requires, by the beginning of its identifier."""

WITHOUT_APACHE = ("gpl-2.0",)
"""Licences that exclude Apache 2.0: its patent clause counts as a further restriction."""


def kind_of(id: str | None) -> str:
    """What sort of licence an identifier stands for; UNKNOWN for those that are not in the table."""
    if id in PERMISSIVES:
        return PERMISSIVE
    if id in _COPYLEFT or id in NON_COMMERCIAL_ALIKE:
        return COPYLEFT
    if id in _NON_COMMERCIAL:
        return NON_COMMERCIAL
    if id in _NO_DERIVATIVES:
        return NO_DERIVATIVES
    return COMMUNITY if id in _COMMUNITY else UNKNOWN


def passed_on(id: str) -> tuple[str, ...]:
    """Other copyleft licences that something under this one may be passed on under."""
    if id in NON_COMMERCIAL_ALIKE:
        return NON_COMMERCIAL_ALIKE[NON_COMMERCIAL_ALIKE.index(id) :]
    return _COPYLEFT[id]
