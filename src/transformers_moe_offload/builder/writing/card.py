"""The README.md of a mixture: what it was made of and how, and how to load it.

The card is made from the files beside it alone, so that it can be made again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from transformers_moe_offload.builder.licences import Verdict
from transformers_moe_offload.builder.recipe.routers import BAKED
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.builder.writing.folder import without_places
from transformers_moe_offload.builder.writing.info import MoeBuildInfo

TAGS = ("moe", "merge", "moe-offload")

_TEXT = """\
# {title}

{what}, built with [transformers-moe-offload](https://pypi.org/project/transformers-moe-offload/) {version}.

| expert | from |
|---|---|
{experts}

{active}

## Load

With Transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With its experts on disk and a cache of them in memory (`pip install transformers-moe-offload`):

```python
import transformers_moe_offload
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", moe_offload={{"cache_budget": "auto"}})
```

## Parameters

{parameters}

## Routers

{gates}
"""
_END = """
## Sources

{sources}
{notices}
## Recipe

```yaml
{recipe}
```
"""


def model_card(
    name: str, info: MoeBuildInfo, recipe: Mapping[str, Any], licence: Verdict, tags: Sequence[str] = ()
) -> str:
    """The card of the mixture `name`, an id on the Hub or a folder's; `recipe` as `MoeRecipe.to_dict` gives it."""
    on_hub = list(dict.fromkeys(source.name for source in info.sources if source.revision is not None))
    origin: dict[str, Any] = {"base_model": on_hub, "base_model_relation": "merge"} if len(on_hub) > 1 else {}
    if len(on_hub) == 1:
        origin = {"base_model": on_hub[0]}
    parameters = info.parameters
    parts = {
        "what": f"A mixture of {len(info.experts)} experts in the `{info.container}` architecture of Transformers",
        "experts": "\n".join(f"| {number} | {expert} |" for number, expert in enumerate(info.experts)),
        "active": f"A token visits {info.experts_per_token} of them, in {len(info.layers)} layers.",
        "parameters": table(
            ("", "parameters"),
            [
                ("stem (attention, embeddings, norms, head)", f"{parameters.stem:,}"),
                ("experts", f"{parameters.experts:,}"),
                *([("shared experts", f"{parameters.shared:,}")] if parameters.shared else []),
                ("routers", f"{parameters.routers:,}"),
                ("all", f"{parameters.total:,}"),
                ("active, for one token", f"{parameters.active:,}"),
            ],
        ),
        "gates": _gates(info),
    }
    return filled_card(_TEXT, parts, name, info.sources, recipe, licence, origin, (*TAGS, *tags))


def filled_card(
    text: str,
    parts: Mapping[str, Any],
    name: str,
    ancestors: Sequence[Ancestor],
    recipe: Mapping[str, Any],
    licence: Verdict,
    origin: Mapping[str, Any],
    tags: Sequence[str],
) -> str:
    """Metadata for the Hub, `text` with its `parts` filled in, and at its end what every card has: sources and recipe.

    `origin` is the metadata that names the base models.
    """
    terms: dict[str, Any] = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    data = ModelCardData(
        **{key: value for key, value in terms.items() if value},
        **origin,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
    )
    filled = (text + _END).format(
        **parts,
        title=name.rpartition("/")[2],
        name=name,
        version=sys.modules[__name__.partition(".")[0]].__version__,  # importing it would point up the layers
        sources=_sources(ancestors, licence),
        notices="".join(f"\n{notice}\n" for notice in licence.notices),
        recipe=yaml.safe_dump(without_places(recipe), sort_keys=False, allow_unicode=True).rstrip(),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{filled}"


def linked(one: Ancestor) -> str:
    """A checkpoint's name, as a link if it is on the Hub."""
    return f"[{one.name}](https://huggingface.co/{one.name})" if one.revision else one.name


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> str:
    """A table in Markdown; all columns but the first are right-aligned, unless `right` lists others."""
    is_right = range(1, len(header)) if right is None else right
    rule = "|".join("---:" if number in is_right else "---" for number in range(len(header)))
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _gates(info: MoeBuildInfo) -> str:
    """How the routers got their weights, with figures for each layer."""
    report = info.gates
    origin = "Those of the mixture of adapters" if report.mode == BAKED else f"Programmed by `{report.mode}`"
    lines = [f"{origin}; condition numbers of the rows, without their mean, by layer:", ""]
    rows = []
    for layer in report.layers:
        entropy = "" if layer.entropy is None else f"{layer.entropy:.2f}"
        home = [share for share in layer.sent_home or () if share == share]
        rows.append(
            (
                str(layer.layer),
                f"{layer.condition:.3g}",
                f"{layer.scale:.3g}",
                entropy,
                f"{sum(home) / len(home):.0%}" if home else "",
            )
        )
    header = ("layer", "condition", "scale", "entropy", "own tokens first")
    return "\n".join([*lines, table(header, rows)])


def _sources(ancestors: Sequence[Ancestor], licence: Verdict) -> str:
    """A table of the models that a mixture was made of, with commits and licences."""
    licences = {one.source: str(one) for one in licence.sources}
    rows = [(linked(one), f"`{one.revision}`" if one.revision else "", licences.get(one.name, "")) for one in ancestors]
    return table(("model", "commit", "licence"), rows, right=())
