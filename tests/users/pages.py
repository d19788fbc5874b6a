"""The pages of the documentation as lists of blocks, and which of them a reader here cannot run.

A block that is not run says why on its page: in its title, or where that would be in a reader's way, in a comment
before it, which is not shown: `<!-- not run: REASON -->`. `<!-- runs in: NAME -->` is for an environment of its own.
"""

import re
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS_A_DOWNLOAD = "needs a download"
CHANGES_THE_ENVIRONMENT = "changes your environment"
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run|runs in): (?P<remark>[^>]*) -->\n\n?)?"
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of Python or bash."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    printed: str | None
    """What the page says that it prints."""
    not_run: str | None
    """Why it is not run here."""
    environment: str | None
    """In which one it is, if not in the reader's."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"place": self.place}


def pages() -> list[str]:
    """README first, then those of the site in its order, then what is read on GitHub alone."""
    of_site = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    return ["README.md", *(f"docs/{page}" for page in of_site), "examples/README.md", "CONTRIBUTING.md"]


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    fences = list(_FENCE.finditer(text))
    assert 2 * len(fences) == len(re.findall(r"^\s*```", text, re.M)), f"{page} has a fence in a form not known here"
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        if fence["language"] not in ("python", "bash"):
            continue
        is_output = following and following["language"] == "text" and not text[fence.end() : following.start()].strip()
        is_left_out = fence["mark"] == "not run" or fence["title"] == NEEDS_A_DOWNLOAD
        found.append(
            Block(
                page,
                text.count("\n", 0, fence.start("text")) + 1,
                fence["language"],
                fence["title"],
                fence["text"],
                following["text"] if is_output else None,
                (fence["remark"] or fence["title"]) if is_left_out else None,
                fence["remark"] if fence["mark"] == "runs in" else None,
            )
        )
    return found


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(page)]
