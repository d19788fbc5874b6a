"""`bake_adapters`: a mixture of adapters as a mixture of dense blocks, each with its adapter merged.

Possible where both compute the same: a router for each feed-forward block, softmax over the chosen adapters, and
adapters on feed-forward blocks only. The routers' rows, trained or not, are divided by the temperature and otherwise
kept.
"""

# E experts, H hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from transformers_moe_offload.builder.adapters.plan import PREFIX
from transformers_moe_offload.builder.checks.similarity import compared
from transformers_moe_offload.builder.gates.fitted import unscaled_gates
from transformers_moe_offload.builder.licences import verdict_of
from transformers_moe_offload.builder.plan import BuildPlan, plan_build
from transformers_moe_offload.builder.recipe import Expert, Gate, MoeRecipe, Origin
from transformers_moe_offload.builder.recipe.routers import BAKED
from transformers_moe_offload.builder.sources import AdapterSource, Ancestor, CheckpointSource
from transformers_moe_offload.builder.sources.checkpoint import as_saved, specs_of
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.builder.writing.folder import MARKS, build_place
from transformers_moe_offload.builder.writing.info import MoeBuildInfo
from transformers_moe_offload.builder.writing.mixture import write_mixture
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.hub.fetch import fetch, published
from transformers_moe_offload.models.adapter_moe import AdapterMoeConfig
from transformers_moe_offload.models.adapter_moe.adapter_folders import FOLDER, WEIGHTS_NAME
from transformers_moe_offload.output.place import expect_place
from transformers_moe_offload.output.shards import Advance
from transformers_moe_offload.tensor_files.index import StoredTensor, read_index
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.untrusted import one_line

_ROUTER = ".router.weight"


def bake_adapters(
    folder: str | Path,
    out: str | Path,
    *,
    container: str = "auto",
    dtype: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> MoeBuildInfo:
    """Merge every adapter of a mixture into a feed-forward block of its own: a checkpoint of `kind: moe`.

    Logits stay the same up to rounding. It is checked like any mixture that is built, and loads without this package.

    Args:
        folder: a mixture of adapters, as `build_adapter_moe` or `save_pretrained` wrote it. It has `router_per: ffn`,
            `scoring: softmax`, and adapters on feed-forward blocks alone; others raise `RecipeError`.
        out: where the checkpoint goes; it must not be there yet, or be empty.
        container: as in a recipe.
        dtype: as in a recipe.
        resume: as in `build_moe`.
        overwrite: as in `build_moe`.
        advance: as in `build_moe`.
    """
    folder, out = Path(folder), Path(out)
    expect_place(out, MARKS, overwrite=overwrite)
    config = _config(folder)
    fetched = fetch(str(folder), config, {})
    stored = read_index(fetched.weights)
    routers = {name.removeprefix(PREFIX): one for name, one in stored.items() if name.endswith(_ROUTER)}
    dense = {name.removeprefix(PREFIX): one for name, one in stored.items() if not name.endswith(_ROUTER)}
    text_config = config.get_text_config()
    specs = as_saved(str(folder), text_config, specs_of(dense), dense)
    base = CheckpointSource(fetched, text_config, specs, dense)
    adapters = [_adapter(base, folder, name) for name in config.adapters]
    recipe = MoeRecipe(
        base_model=Origin(model=str(folder)),
        experts=tuple(Expert(name=name, source=Origin(adapter=name)) for name in config.adapters),
        experts_per_token=config.num_experts_per_tok,
        container=container,
        dtype=dtype,
        gate=Gate(mode=BAKED),
    )
    plan = plan_build(recipe, [base, *adapters], [base])
    _expect_same(plan, config, folder, routers)
    # The mixture's card has the licence that follows from all the adapters' licences.
    verdict = verdict_of(base.ancestors, recipe)
    plan = compared(replace(plan, licence=verdict, warnings=(*plan.warnings, *verdict.warnings)))
    companions = {file.name: published(file) for file in base.companions}
    rows = {
        layer: read_stored(routers[path + _ROUTER]).float() / config.temperature for layer, path in plan.ffn.items()
    }
    gates = unscaled_gates(recipe.gate, plan.mixture.names, rows, plan.container.scores)
    about = (plan.container.name, plan.ancestors, plan.warnings)
    with build_place(out, recipe, *about, overwrite=overwrite, resume=resume) as place:
        return write_mixture(plan, gates, TensorReader(plan, gates.rows), companions, place, out, advance=advance)


def _config(folder: Path) -> AdapterMoeConfig:
    """The mixture's config; raises an error of ours for another kind of model, and for routers unlike a container's."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # config classes raise all kinds of errors for unexpected values
        raise CheckpointError(f"cannot read the config of {folder}: {one_line(error, 600)}") from error
    if not isinstance(config, AdapterMoeConfig):
        raise RecipeError(f"{folder} is a {config.model_type}; only a mixture of adapters (adapter_moe) is baked")
    for name, needed in (("router_per", "ffn"), ("scoring", "softmax")):
        if getattr(config, name) != needed:
            raise RecipeError(
                f"{folder} has {name}={getattr(config, name)!r}, and routers of dense blocks work like "
                f"{name}={needed!r}; build the mixture so, or keep it as it is"
            )
    return config


def _adapter(base: CheckpointSource, folder: Path, name: str) -> AdapterSource:
    own = folder / FOLDER / name
    return AdapterSource(base, own, Ancestor(name, None, (own / WEIGHTS_NAME,), None))


def _expect_same(plan: BuildPlan, config: AdapterMoeConfig, folder: Path, routers: Mapping[str, StoredTensor]) -> None:
    """Raise unless each feed-forward block has a router, nothing else has one (adapters add to nothing else then), and
    routers score as the container's do."""
    if plan.container.scores != "softmax":
        raise RecipeError(
            f"{plan.container.name} scores experts by {plan.container.scores}, and {folder} by softmax; set container "
            f"to another"
        )
    places = {path + _ROUTER for path in plan.ffn.values()}
    other = sorted(routers.keys() - places)
    if other:
        raise RecipeError(
            f"adapters of {folder} add to {other[0].removesuffix(_ROUTER)} (target_modules: "
            f"{', '.join(config.target_modules)}), which is no feed-forward block, and only these become experts; keep "
            f"the mixture as it is, or leave such adapters out"
        )
    missing = sorted(places - routers.keys())
    if missing:
        raise CheckpointError(f"{folder} has no tensor {PREFIX}{missing[0]}; is it complete?")
