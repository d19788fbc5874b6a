"""Write a mixture of adapters, check it, and put it in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import CONFIG_NAME
from transformers.utils.logging import tqdm

from transformers_moe_offload.builder.adapters.card import adapters_card
from transformers_moe_offload.builder.adapters.plan import PREFIX, AdapterPlan, plan_adapters
from transformers_moe_offload.builder.adapters.routers import router_rows
from transformers_moe_offload.builder.checks import CheckFailedError
from transformers_moe_offload.builder.gates import GateReport
from transformers_moe_offload.builder.publish import published_after
from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources.model_class import on_meta
from transformers_moe_offload.builder.writing.folder import CARD_NAME, INFO_NAME, build_place
from transformers_moe_offload.builder.writing.weight_files import write_checkpoint
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hf.upstream import custom_object_save
from transformers_moe_offload.hub.fetch import published
from transformers_moe_offload.models.adapter_moe import AdapterMoeForCausalLM
from transformers_moe_offload.models.adapter_moe import adapter_folders as folders
from transformers_moe_offload.output.shards import Advance, Content
from transformers_moe_offload.tensor_files.writer import as_json, write_bytes, write_text

CHECKED_UP_TO = 256 * 2**20
"""Bytes of a dense model up to which the mixture's logits are compared with it: both are in memory then."""
TOLERANCE = 1e-4
"""Of the largest logit: in float32, rounding gives 1e-6."""
NUM_CHECKED = 8
"""Number of adapters whose logits are compared, spread evenly over all."""


@dataclass(frozen=True)
class AdapterMoeInfo:
    """A mixture of adapters that was built."""

    folder: Path
    adapters: tuple[str, ...]
    parameters: dict[str, int]
    """Counts of `dense`, `routers`, and `adapters` (all adapters together)."""
    sources: tuple[dict[str, str | None], ...]
    """Every checkpoint that it is made of, with its commit where there is one."""
    gates: GateReport | None
    forced_expert: float | None
    """Largest difference of logits from those of the dense model with one adapter merged; None where the model was too
    large to be compared."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, without the folder."""
        return {name: value for name, value in asdict(self).items() if name != "folder"} | {"container": "adapter_moe"}


def build_adapter_moe(
    recipe: MoeRecipe,
    folder: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    push: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    advance: Advance | None = None,
) -> AdapterMoeInfo:
    """Build a mixture of adapters; the arguments are those of `build_moe`.

    The adapters' files are copied unchanged. For some of the adapters, the mixture with that adapter alone must give
    the logits of the dense model with the adapter merged into it.
    """
    folder = Path(folder)
    with published_after(folder, recipe.hub, push, overwrite=overwrite, token=token):
        plan = plan_adapters(recipe, token=token, local_files_only=local_files_only)
        about = (plan.config.model_type, plan.ancestors, plan.licence.warnings)
        rows, report = router_rows(plan, device=device)
        contents = [Content((spec,), partial(_tensor, plan, rows, spec)) for spec in plan.tensors]
        with build_place(folder, recipe, *about, overwrite=overwrite, resume=resume) as place:
            with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="Writing", disable=advance is not None) as bar:
                write_checkpoint(place, contents, advance or bar.update, recipe.output.max_shard_bytes)
                _copy_adapters(plan, place, advance or bar.update)
            for file in plan.base.companions:
                write_bytes(place / file.name, published(file))
            # The model classes go along, so that the mixture loads without the package.
            for own in (plan.config, on_meta(plan.config)):
                custom_object_save(own, place, config=plan.config)
            write_text(place / CONFIG_NAME, plan.config.to_json_string())
            info = AdapterMoeInfo(
                folder=folder,
                adapters=tuple(adapter.name for adapter in plan.adapters),
                parameters=_parameters(plan),
                sources=tuple({"name": one.name, "revision": one.revision} for one in plan.ancestors),
                gates=report,
                forced_expert=_check_alone(plan, place),
            )
            write_text(place / INFO_NAME, as_json(info.as_dict()))
            name = push or recipe.hub.repo_id or folder.resolve().name
            write_text(place / CARD_NAME, adapters_card(name, plan, info.parameters))
            return info


def _tensor(plan: AdapterPlan, rows: dict[str, Tensor], spec: FieldSpec) -> dict[str, Tensor]:
    found = rows[spec.name] if spec.name in rows else plan.base.read(spec.name.removeprefix(PREFIX))
    return {spec.name: found.to(torch_dtype(spec.dtype))}


def _copy_adapters(plan: AdapterPlan, place: Path, done: Advance) -> None:
    for adapter in plan.adapters:
        target = place / folders.FOLDER / adapter.name
        target.mkdir(parents=True, exist_ok=True)
        for name in (folders.WEIGHTS_NAME, folders.CONFIG_NAME):
            write_bytes(target / name, published(adapter.folder.folder / name))
        done(adapter.folder.weights.stat().st_size)


def _parameters(plan: AdapterPlan) -> dict[str, int]:
    def count(specs: Iterable[FieldSpec]) -> int:
        return sum(prod(spec.shape) for spec in specs)

    in_adapters = 0
    for adapter in plan.adapters:
        for path in adapter.folder.paths():
            found = adapter.folder.read(path)
            assert found is not None
            in_adapters += sum(matrix.numel() for matrix in found)
    return {"dense": count(plan.dense.values()), "routers": count(plan.routers.values()), "adapters": in_adapters}


@torch.no_grad()
def _check_alone(plan: AdapterPlan, place: Path) -> float | None:
    """Load what was written, and compare some adapters alone with the dense models they make.

    Raises `CheckFailedError`; returns the largest difference, or None where the dense model is too large.
    """
    if sum(spec.nbytes for spec in plan.dense.values()) > CHECKED_UP_TO:
        return None
    model, found = AutoModelForCausalLM.from_pretrained(
        place, output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    trouble = {name: value for name, value in found.items() if value}
    if trouble:
        raise CheckFailedError(f"reload: Transformers loads the mixture with {trouble}")
    assert isinstance(model, AdapterMoeForCausalLM)
    tokens = torch.arange(min(12, plan.base.config.vocab_size))[None]
    worst = 0.0
    for number in _spread(len(plan.adapters)):
        with model.taking_only(number):
            logits = model(input_ids=tokens, use_cache=False).logits
        expected = _merged_logits(plan, number, tokens)
        difference, allowed = (logits - expected).abs().max().item(), TOLERANCE * expected.abs().max().item()
        if not difference <= allowed:  # also raises for NaN
            raise CheckFailedError(
                f"forced expert: {plan.adapters[number].name} alone does not reproduce "
                f"{plan.base.name} with it merged: logits differ by {difference:.2g}, and rounding explains at most "
                f"{allowed:.2g}"
            )
        worst = max(worst, difference)
    return worst


def _spread(count: int) -> Sequence[int]:
    """Up to `NUM_CHECKED` numbers below a count, spread evenly, the first and the last among them."""
    return sorted({round(step * (count - 1) / max(1, NUM_CHECKED - 1)) for step in range(NUM_CHECKED)})


def _merged_logits(plan: AdapterPlan, number: int, tokens: Tensor) -> Tensor:
    """Logits of the dense model with one adapter merged into it."""
    dense = AutoModelForCausalLM.from_config(plan.base.config, dtype=torch.float32).eval()
    dense.load_state_dict({name: one for name, one in _merged(plan, number)}, strict=False)
    dense.tie_weights()
    logits: Tensor = dense(input_ids=tokens, use_cache=False).logits
    return logits


def _merged(plan: AdapterPlan, number: int) -> Iterator[tuple[str, Tensor]]:
    dense = plan.adapters[number].dense
    stored = {name: torch_dtype(spec.dtype) for name, spec in plan.dense.items()}
    for name in plan.base.tensors:
        # The mixture rounds the base's weights, not the sum with the adapter's; the merged model must round the same.
        delta = dense.read(name).float() - plan.base.read(name).float()
        yield name, plan.base.read(name).to(stored[name]).float() + delta
