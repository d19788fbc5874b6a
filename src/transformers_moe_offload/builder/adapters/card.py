"""The README.md of a mixture of adapters: what it was made of and how, its licence, how large it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from transformers_moe_offload.builder.adapters.plan import AdapterPlan
from transformers_moe_offload.builder.writing.card import filled_card, linked, table

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
"""


def adapters_card(name: str, plan: AdapterPlan, parameters: Mapping[str, int]) -> str:
    """The card of the mixture `name`, an id on the Hub or a folder's.

    `base_model` names the base model alone: the Hub shows a list as a merge.
    """
    base = plan.base.ancestors[0]
    origin = {"base_model": base.name, "base_model_relation": "adapter"} if base.revision else {}
    recipe, routing = plan.recipe, plan.recipe.adapter_moe
    assert routing is not None
    parts = {
        "num_adapters": len(plan.adapters),
        "base": linked(base),
        "per_token": plan.config.num_experts_per_tok,
        "routers": "" if routing.scoring == "uniform" else f", chosen by a router per {routing.router_per}",
        "parameters": table(
            ("", "parameters"),
            [(part, f"{count:,}") for part, count in parameters.items()] + [("all", f"{sum(parameters.values()):,}")],
        ),
    }
    tags = (*TAGS, *recipe.hub.tags)
    return filled_card(_TEXT, parts, name, plan.ancestors, recipe.to_dict(), plan.licence, origin, tags)
