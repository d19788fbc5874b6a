"""The README.md of a mixture of adapters: what it was made of and how, its licence, how large it is, how to load it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from transformers_moe_offload.builder.adapters.plan import AdapterPlan
from transformers_moe_offload.builder.licences import Verdict
from transformers_moe_offload.builder.writing.card import linked, sources_table, table
from transformers_moe_offload.builder.writing.folder import without_places

TAGS = ("moe", "lora", "moe-offload")

_TEXT = """\
# {title}

A mixture of {num_adapters} LoRA adapters around {base}, built with
[transformers-moe-offload](https://pypi.org/project/transformers-moe-offload/) {version}. A token takes
{per_token} of them{routers}.

## Load

With the adapters in their files and a cache of them in memory (`pip install transformers-moe-offload`):

```python
import transformers_moe_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", moe_offload={{"cache_budget": "auto"}})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without the package, with all adapters in memory, `trust_remote_code=True` does. Each folder in `adapters` is an adapter
of PEFT, which loads any one of them alone.

## Parameters

{parameters}

## Sources

{sources}
{notices}
## Recipe

```yaml
{recipe}
```
"""


def adapters_card(
    name: str,
    plan: AdapterPlan,
    parameters: Mapping[str, int],
    licence: Verdict,
    tags: Sequence[str] = (),
) -> str:
    """The card of the mixture `name`, an id on the Hub or a folder's.

    `base_model` names the base model alone: the Hub shows a list as a merge.
    """
    base = plan.base.ancestors[0]
    origin: dict[str, Any] = {"base_model": base.name, "base_model_relation": "adapter"} if base.revision else {}
    terms: dict[str, Any] = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    data = ModelCardData(
        **{key: value for key, value in terms.items() if value},
        **origin,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys((*TAGS, *tags))),
    )
    routing = plan.recipe.adapter_moe
    assert routing is not None
    text = _TEXT.format(
        title=name.rpartition("/")[2],
        name=name,
        version=sys.modules[__name__.partition(".")[0]].__version__,  # importing it would point up the layers
        num_adapters=len(plan.adapters),
        base=linked(base),
        per_token=plan.config.num_experts_per_tok,
        routers="" if routing.scoring == "uniform" else f", chosen by a router per {routing.router_per}",
        parameters=table(
            ("", "parameters"),
            [(part, f"{count:,}") for part, count in parameters.items()] + [("all", f"{sum(parameters.values()):,}")],
        ),
        sources=sources_table(plan.ancestors, licence),
        notices="".join(f"\n{notice}\n" for notice in licence.notices),
        recipe=yaml.safe_dump(without_places(plan.recipe.to_dict()), sort_keys=False, allow_unicode=True).rstrip(),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"
