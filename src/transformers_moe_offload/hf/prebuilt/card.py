"""The README.md of a prebuilt checkpoint: what it was made from and how, how large it is, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from transformers_moe_offload.config import ExpertFormats, OffloadConfig
from transformers_moe_offload.hf.model.plan import readable
from transformers_moe_offload.hf.prebuilt.names import AUTO_CLASSES
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.upstream import auto_classes_of
from transformers_moe_offload.hub.fetch import Fetched

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the original's card that also holds for the quantized model."""

_TEXT = """\
# {title}

{base}, quantized with HQQ by
[transformers-moe-offload](https://pypi.org/project/transformers-moe-offload/), which keeps the experts of
mixture-of-experts models on disk and a cache of them in memory.

## Load

```python
import transformers_moe_offload
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}", moe_offload={{"cache_budget": "auto"}})
```

Without the package (`pip install transformers-moe-offload`) it does not load: Transformers does not know the format.

## Recipe

{recipe}

The experts take {bits:.2f} bits per weight, scales and zeros included.

## Sizes

|  | here | original |
|---|---:|---:|
| all {num_experts} experts, on disk | {experts} | {plain_experts} |
| dense weights, in memory | {dense} | {plain_dense} |
| smallest `cache_budget`, in memory | {smallest} | |

With a `cache_budget` of {cache} no expert is read twice.
"""


def model_card(
    name: str,
    fetched: Fetched,
    config: OffloadConfig,
    sizes: Sizes,
    *,
    base_model: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
    left_as: str = "as in the original",
    dense_left_as: str = "as in the original",
) -> str:
    """The card of the checkpoint `name`; licence, language and the like come from the source's card.

    `base_model` is the original's id on the Hub if it was not read from there; `left_as` and `dense_left_as` describe
    experts and the dense part if they have no format.
    """
    base_model = base_model or (fetched.name if fetched.revision else None)
    origin: dict[str, Any] = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    data = ModelCardData(
        **_kept(fetched.card),
        **origin,
        library_name="transformers",
        tags=["mixture-of-experts", "quantized", "hqq", "moe-offload"],
    )
    text = _TEXT.format(
        title=name.rpartition("/")[2],
        name=name,
        auto_class=auto_class,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else fetched.name,
        recipe=_table(config, left_as, dense_left_as),
        bits=sizes.bits_per_expert_weight,
        num_experts=sizes.num_experts,
        experts=readable(sizes.expert_bytes),
        plain_experts=readable(sizes.plain_expert_bytes),
        dense=readable(sizes.dense_bytes),
        plain_dense=readable(sizes.plain_dense_bytes),
        cache=readable(sizes.cache_bytes),
        smallest=readable(sizes.smallest_budget),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def auto_class_of(model: Any) -> str:
    """The Auto class that loads a model as its own class."""
    for name, classes in auto_classes_of(model.config, AUTO_CLASSES):
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            return name
    return "AutoModelForCausalLM"


def _kept(source_card: Path | None) -> dict[str, Any]:
    """The `_KEPT` metadata of the source's card; empty if there is no readable card."""
    if source_card is None:
        return {}
    try:
        data = ModelCard.load(source_card, ignore_metadata_errors=True).data
    except (ValueError, OSError, YAMLError):
        return {}
    return {key: data.get(key) for key in _KEPT if data.get(key) is not None}


def _table(config: OffloadConfig, left_as: str, dense_left_as: str) -> str:
    formats = config.formats or ExpertFormats()
    rows = [("experts", formats.default, left_as)]
    rows += [(f"experts of sparse layers {key}", format, left_as) for key, format in formats.layers.items()]
    rows += [(f"{formats.num_hot} experts that are used most", formats.hot, left_as)] if formats.num_hot else []
    rows += [("attention and dense MLPs", config.dense, dense_left_as)]
    rows += [("output embedding", config.lm_head, dense_left_as)] if config.lm_head is not None else []
    lines = [
        f"| {what} | {format or otherwise} | {f'{format.bits_per_weight:.4g}' if format else ''} |"
        for what, format, otherwise in rows
    ]
    return "\n".join(["| weights | format | bits per weight |", "|---|---|---:|", *lines])
