"""Tables that can be shown in a terminal and written down as Markdown."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.table import Table as RichTable

MIB = 2**20


class Table(NamedTuple):
    """The first column names the rows, the others are figures."""

    title: str
    header: list[str]
    rows: list[list[str]]


def for_terminal(table: Table) -> RichTable:
    """A table for rich."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def as_markdown(table: Table) -> str:
    """The table under a heading."""
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [f"## {table.title}", "", *map(_line, (table.header, rule, *table.rows))]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mib(nbytes: float) -> str:
    """A number of bytes in MiB."""
    return f"{nbytes / MIB:.1f}"
