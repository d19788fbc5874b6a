"""Tables of a benchmark, wherever they are shown."""

from io import StringIO

import pytest
from rich.console import Console

from transformers_moe_offload.bench.tables import Table, show

FIGURES = ["123.45 to 678.90"] * 12
TABLE = Table("Decoding", ["workload", *["share of resident speed"] * 12], [["decode", *FIGURES]])


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_figure_of_a_table_is_cut_however_narrow_the_terminal(is_terminal):
    console = Console(file=StringIO(), force_terminal=is_terminal, width=80, color_system=None)
    show(console, TABLE)
    lines = console.file.getvalue().splitlines()
    row = next(line for line in lines if "decode" in line)
    assert row.split("  ")[1:2] == ["decode"]
    assert row.count(FIGURES[0]) == len(FIGURES)
    assert not any("share of resident speed" in line for line in lines), "headers are broken before they take columns"
    assert sum("resident" in line for line in lines) == 1
