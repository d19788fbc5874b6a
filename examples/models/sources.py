"""Say where the text of each domain is found on this machine, and clean it.

Only text that ships with Python or with Debian packages is read. Yields `(name, text)` pairs; `name` is relative to its
root, so it carries no path of the machine. `corpus.py` deduplicates, splits and tokenises.
"""

import gzip
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DOMAINS = ("prose", "python", "c")
MIN_BYTES, MAX_BYTES = 400, 250_000
"""Shorter files are stubs; longer ones are, nearly all, generated tables (keysyms, GL enums, code pages)."""

ROFF_FONT = re.compile(r"\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d+|\\[&|^/,:%]|\\c$", re.M)
ROFF_KEPT = (".SH ", ".SS ", ".B ", ".I ", ".BR ", ".BI ", ".IR ", ".RB ", ".RI ", ".TP ", ".IP ", ".Nm ", ".Fl ")
LICENCE_COMMENT = re.compile(r"\A\s*/\*.*?\*/\s*", re.S)
CPLUSPLUS = re.compile(r"^\s*(template\s*<|namespace\s+\w+|class\s+\w+|using\s+namespace|public:|private:)", re.M)


def roff_to_text(source: str) -> str:
    """The readable words of a man page: macros dropped, headings and emphasised words kept, escapes undone."""
    if source.startswith(".so "):
        return ""
    lines = []
    for line in source.splitlines():
        if line.startswith((".SH ", ".SS ")):
            lines += ["", line[4:].strip('" ')]
        elif line.startswith((".TP", ".PP", ".P", ".IP", ".LP")) and not line.startswith('.IP "'):
            lines.append("")
        elif line.startswith(ROFF_KEPT):
            lines.append(line.split(" ", 1)[1].replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = "\n".join(lines)
    for old, new in ((r"\(aq", "'"), (r"\(dq", '"'), (r"\(bu", "*"), (r"\-", "-"), (r"\e", "\\"), (r"\ ", " ")):
        text = text.replace(old, new)
    text = re.sub(r"\\\*\(..|\\\(..|\\\*\[[^]]*\]|\\\[[^]]*\]", "", ROFF_FONT.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def info_to_text(source: str) -> str:
    """A GNU Info file without its node headers, menus' separators and index."""
    body = source.split("\x1f\nTag Table:")[0]
    kept = [line for line in body.splitlines() if not line.startswith(("\x1f", "File: ", "START-INFO", "END-INFO"))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).replace("\x7f", "") + "\n"


def c_without_licence(source: str) -> str:
    """C text without a leading licence comment (thousands of near copies); empty when the file is really C++."""
    if CPLUSPLUS.search(source):
        return ""
    first = LICENCE_COMMENT.match(source)
    is_licence = first is not None and re.search("copyright|licen[cs]e", first.group(), re.I) is not None
    return source[first.end() :] if is_licence else source


def unchanged(source: str) -> str:
    return source


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder tree and which of its files belong to a domain."""

    domain: str
    root: Path
    patterns: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Path parts or name beginnings to leave out."""
    clean: Callable[[str], str] = field(default=unchanged)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Cleaned `(name, text)` of every readable file, in name order."""
        files = {path for pattern in self.patterns for path in self.root.glob(pattern) if path.is_file()}
        for path in sorted(files):
            relative = path.relative_to(self.root)
            if any(part.lower().startswith(self.without) for part in relative.parts if self.without):
                continue
            text = read(path)
            text = self.clean(text) if text else ""
            if MIN_BYTES <= len(text.encode()) <= MAX_BYTES:
                yield str(relative), text


def read(path: Path) -> str:
    """UTF-8 text of a plain or gzipped file with Unix newlines; empty when it is not UTF-8 text."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (UnicodeDecodeError, OSError, EOFError):
        return ""
    return "" if "\0" in text else text.replace("\r\n", "\n").expandtabs(8)


def sources() -> list[Source]:
    """Every place read, prose first."""
    stdlib, include = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "include"))
    share, headers = Path("/usr/share"), Path("/usr/include")
    skip_in_stdlib = ("site-packages", "test", "encodings", "pydoc_data", "__pycache__", "idle_test", "lib2to3")
    skip_headers = ("c++", "llvm", "node", "python", "unicode", "z3++", "glext", "gl3", "gl2", "gl31", "gl32")
    return [
        Source(
            domain="prose",
            root=share / "man",
            patterns=("man2/*", "man4/*", "man5/*", "man7/*", "man8/*"),
            clean=roff_to_text,
        ),
        Source(domain="prose", root=share / "info", patterns=("*.gz",), clean=info_to_text),
        Source(domain="prose", root=share / "vim", patterns=("vim*/doc/*.txt",)),
        Source(domain="prose", root=share / "common-licenses", patterns=("*",)),
        Source(
            domain="prose",
            root=share / "doc",
            patterns=("**/README*", "**/*.txt", "**/*.txt.gz", "**/*.rst", "**/*.md", "**/*.md.gz"),
            without=("changelog", "examples", "relnotes", "copyright", "news", "node", "x11proto", "xextproto"),
        ),
        Source(
            domain="prose", root=stdlib, patterns=("LICENSE*", "**/*.rst", "**/README*"), without=("site-packages",)
        ),
        Source(domain="python", root=stdlib, patterns=("**/*.py",), without=skip_in_stdlib),
        Source(domain="c", root=include, patterns=("**/*.h",), clean=c_without_licence),
        Source(domain="c", root=headers, patterns=("**/*.h",), without=skip_headers, clean=c_without_licence),
        Source(domain="c", root=share / "doc", patterns=("**/*.c",), clean=c_without_licence),
    ]


def documentation_topics() -> Iterator[tuple[str, str]]:
    """The topics of `help()`, which Python ships as strings of prose."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        if len(text) >= MIN_BYTES:
            yield f"pydoc/{name}", text
