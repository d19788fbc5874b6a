"""Write results down and show them: what all commands of this folder end with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from transformers_moe_offload.bench.conditions import described
from transformers_moe_offload.bench.tables import Table, as_markdown
from transformers_moe_offload.bench.tables import show as show_table

Verdict = tuple[str, bool | None]
"""A promise with its figures; kept, broken, or None where it was not measured."""

SIGNS = {True: "kept", False: "broken", None: "not measured"}


def write(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Write the results as JSON; their `date` becomes part of the name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def show(path: Path, result: dict[str, Any], tables: list[Table], verdicts: list[Verdict]) -> None:
    """Print conditions, tables, verdicts and failures, and write the same as Markdown beside the results."""
    console = Console()
    facts = described(result["conditions"]) | result.get("facts", {})
    lines = [f"# {path.stem}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for name, value in facts.items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False, highlight=False)
    for table in tables:
        show_table(console, table)
        lines.append(as_markdown(table))
    said = [f"{SIGNS[is_kept]}: {promise}" for promise, is_kept in verdicts]
    said += [f"{name} failed: {error}" for name, error in result.get("failed", {}).items()]
    for line in said:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
        lines.append(f"- {line}")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    console.print(f"written to {path} and {path.with_suffix('.md').name}", soft_wrap=True)
