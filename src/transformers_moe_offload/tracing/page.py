"""One HTML page with plots and tables in it, that needs no other file and no network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_moe_offload.notebook import html_table
from transformers_moe_offload.tracing.trace_file import whole_file

_STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6578; --line: #dfe3ea; --paper: #ffffff; --back: #f5f6f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 80ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
section { padding: 20px; margin-top: 20px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; }
img + .wide { margin-top: 20px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence on how to read it, and a figure or rows of a table, or both."""

    title: str
    text: str = ""
    figure: Any = None
    """A figure of matplotlib."""
    rows: Sequence[Mapping[str, Any]] = ()
    """With the same keys, which become the heads of columns."""


def make_page(title: str, text: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(text)}</p>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def save_page(page: str, path: str | os.PathLike[str]) -> None:
    """Write a page, wholly or not at all."""
    with whole_file(Path(path), "the page") as unfinished:
        unfinished.write_bytes(page.encode())


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.figure is not None:
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{_png(section.figure)}">')
    if section.rows:
        parts.append(f'<div class="wide">{_table(section.rows)}</div>')
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _png(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return html_table([str(name) for name in rows[0]], [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.3f}"
    return str(value)
