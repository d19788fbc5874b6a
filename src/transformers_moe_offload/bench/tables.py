"""Tables that can be shown in a terminal and written down as Markdown."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

MIB = 2**20

UNBOUNDED = 10_000
"""Columns: more than any table has."""


class Table(NamedTuple):
    """The first column names the rows, the others are figures."""

    title: str
    header: list[str]
    rows: list[list[str]]


def show(console: Console, table: Table) -> None:
    """Print a table, as wide as its figures are: words of its header stand below one another where that saves columns,
    and a terminal that is narrower than that breaks lines, but loses nothing."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(table.header):
        whole = [*name.split(), *(row[number] for row in table.rows)]
        shown.add_column(name, justify="right" if number else "left", min_width=max(map(len, whole)))
    for row in table.rows:
        shown.add_row(*row)
    width = Measurement.get(console, console.options.update(width=UNBOUNDED), shown).minimum
    console.print(shown, width=max(width, len(table.title)), crop=False)


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
