"""Build, feed, save: the zoo as tests see it. One small random model per Mixture-of-Experts architecture.

    for name in zoo_names():
        model = build(name)
        logits = output_tensor(model(**inputs(name, model)))

Which architectures exist is `inventory.py`'s to say, how small they are `shrink.py`'s, what they need on top
`catalogue.py`'s.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .catalogue import CLASS_ENDINGS, INPUTS, OVERRIDES, VARIANTS
from .inputs import text, text_to_text
from .inventory import NOT_TOKEN_ROUTED, moe_model_dirs
from .shrink import tiny
from .weights import randomise

LAYOUTS = ("per-expert", "fused")


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """What it takes to build one model of the zoo and to run it."""

    name: str
    directory: str
    """Below `transformers/models`; differs from the name where a directory has several classes with experts."""
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    make_inputs: Callable[[PreTrainedModel, torch.Generator, int, int], dict[str, Tensor]]


def zoo_names() -> list[str]:
    """Every model of the zoo: all token-routed directories of the inventory, a few of them more than once."""
    names = [directory for directory in moe_model_dirs() if directory not in NOT_TOKEN_ROUTED]
    return sorted({*names, *VARIANTS})


def zoo_model(name: str) -> ZooModel:
    """The entry called `name`, with a configuration of its own to change at will."""
    entry = _entry(name)
    return replace(entry, config=copy.deepcopy(entry.config))


@functools.cache
def _entry(name: str) -> ZooModel:
    directory, class_name = VARIANTS.get(name, (name, None))
    classes = _model_classes(directory)
    model_class = classes[class_name] if class_name else _class_with_a_head(classes)
    is_config_alone = moe_model_dirs()[directory].defined_in is not None
    config_class = type(AutoConfig.for_model(directory)) if is_config_alone else model_class.config_class
    config = tiny(config_class, OVERRIDES.get(name))
    default_inputs = text_to_text if config.is_encoder_decoder else text
    return ZooModel(
        name=name,
        directory=directory,
        model_class=model_class,
        config=config,
        make_inputs=INPUTS.get(name, default_inputs),
    )


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model in eval mode, running its own eager experts, every weight drawn from `seed`."""
    entry = zoo_model(name)
    model = entry.model_class._from_config(entry.config, dtype=dtype, experts_implementation="eager")
    randomise(model, seed)
    return model.eval()


def inputs(name: str, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for one forward of `model`, the same for every model of that name."""
    return _entry(name).make_inputs(model, torch.Generator().manual_seed(seed), batch, length)


def output_tensor(outputs) -> Tensor:
    """The tensor two runs are compared by: the logits, or the last hidden state of a model without a head."""
    return outputs.logits if getattr(outputs, "logits", None) is not None else outputs.last_hidden_state


def save(model: PreTrainedModel, folder: Path, layout: str) -> None:
    """Write a checkpoint: "per-expert" as its authors laid it out, "fused" as Transformers holds it in memory.

    Not every author stored experts one by one: some original layouts are stacked, and some equal the fused one.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {LAYOUTS}")
    model.save_pretrained(folder, save_original_format=layout == "per-expert")


def load(plain: PreTrainedModel, folder: Path, **options):
    """What `AutoModel` makes of a checkpoint of a model of the zoo: the model's class with the checkpoint's own config.

    Not every class has a config of its own, and not every model of the zoo is in one of the `Auto` lists.
    """
    config = type(plain.config).from_pretrained(folder)
    return type(plain).from_pretrained(folder, config=config, **options)


@functools.cache
def failure_of_stock(name: str) -> Exception | None:
    """What the model's forward raises in Transformers itself; None if it runs, as it should.

    A release that breaks an architecture is nothing that a test of ours can mend: such a test passes if the offloaded
    model fails as the plain one does.
    """
    model = build(name)
    try:
        with torch.no_grad():
            model(**inputs(name, model))
    except Exception as error:  # whatever upstream does wrong
        return error.with_traceback(None)
    return None


def _model_classes(directory: str) -> dict[str, type[PreTrainedModel]]:
    """The public model classes that a directory defines, or those of another one that it is a config for, by name."""
    evidence = moe_model_dirs()[directory]
    if evidence.defined_in is not None:
        classes = _model_classes(evidence.defined_in)
        return {name: classes[name] for name in evidence.model_classes}
    found = {}
    package = importlib.import_module(f"transformers.models.{directory}")
    for file in sorted(Path(package.__path__[0]).glob("modeling_*.py")):
        module = importlib.import_module(f"{package.__name__}.{file.stem}")
        public = {name: getattr(module, name) for name in module.__all__}
        found |= {name: it for name, it in public.items() if isinstance(it, type) and issubclass(it, PreTrainedModel)}
    return found


def _class_with_a_head(classes: dict[str, type[PreTrainedModel]]) -> type[PreTrainedModel]:
    """The most complete class there is; the shortest name among several, for deprecated aliases are longer."""
    for ending in CLASS_ENDINGS:
        names = [name for name in classes if name.endswith(ending)]
        if names:
            return classes[min(names, key=len)]
    raise LookupError(f"none of {sorted(classes)} ends in one of {CLASS_ENDINGS}; name the class in VARIANTS")
