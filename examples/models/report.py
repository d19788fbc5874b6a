"""Fill the tables of README.md from results.json and manifest.json, between their markers.

python report.py
"""

import json
import re
from pathlib import Path

from sources import DOMAINS

HERE = Path(__file__).resolve().parent


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def perplexity_table(results: dict) -> str:
    rows = []
    for name, row in results["perplexity"].items():
        label = {"unigram": "unigram of the same domain"}.get(name, name)
        rows.append([label, *(f"{row[domain]:.1f}" for domain in DOMAINS)])
    tokens = ["held-out tokens predicted", *(f"{results['held_out_tokens'][domain]:,}" for domain in DOMAINS)]
    return table(["held-out perplexity", *DOMAINS], [*rows, tokens])


def manifest_table(manifest: dict) -> str:
    rows = [
        [f"{domain}, {split.replace('_', '-')}", *(f"{part[key]:,}" for key in ("files", "bytes", "tokens"))]
        for domain, splits in manifest.items()
        for split, part in splits.items()
    ]
    return table(["part", "files", "bytes", "tokens"], rows)


def training_table(results: dict) -> str:
    rows = []
    for name, facts in results["training"].items():
        parameters = results["parameters"].get(name, "")
        parameters = f"{parameters:,}" if parameters else "adapter"
        rows.append(
            [
                f"`{name}`",
                parameters,
                f"{facts['steps']:,}",
                f"{facts['tokens'] / 1e6:.1f} M",
                f"{facts['learning_rate']:g}",
                f"{facts['minutes']:.0f}",
            ]
        )
    return table(["model", "parameters", "steps", "tokens seen", "peak learning rate", "minutes"], rows)


def router_lines(results: dict) -> str:
    router = results["router"]
    return (
        f"The least used expert of any layer gets {router['least_load']:.2f} of a uniform share, the most used "
        f"{router['most_load']:.2f}: none is dead. On average an expert's favourite domain supplies "
        f"{100 * router['mean_strongest_domain_share']:.0f} % of its tokens (33 % would be no preference)."
    )


def sample_blocks(results: dict) -> str:
    return "\n\n".join(
        f"{domain}:\n\n" + "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        for domain, text in results["samples"]["tiny-moe"].items()
    )


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    parts = {
        "results": perplexity_table(results),
        "manifest": manifest_table(json.loads((HERE / "manifest.json").read_text())),
        "training": training_table(results),
        "router": router_lines(results),
        "samples": sample_blocks(results),
    }
    readme = (HERE / "README.md").read_text()
    for name, text in parts.items():
        block = f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"
        pattern = re.compile(f"<!-- {name} -->.*?<!-- end -->", re.S)
        if not pattern.search(readme):
            raise ValueError(f"README.md has no place for {name}; write <!-- {name} --><!-- end --> there")
        readme = pattern.sub(lambda _, block=block: block, readme)
    (HERE / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
