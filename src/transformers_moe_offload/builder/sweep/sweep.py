"""`sweep_gates`: build a mixture once, program its routers in several ways, and score each on held-out text.

Which gate is best depends on models and texts, and cannot be known beforehand (arXiv 2408.17280 recommends a validation
of this kind). The texts pass the base model once for all gates; the mixture stays loaded between them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transformers_moe_offload.builder.build import build_moe, validate_recipe
from transformers_moe_offload.builder.gates import program_several
from transformers_moe_offload.builder.plan import BuildPlan
from transformers_moe_offload.builder.recipe import Gate, MoeRecipe
from transformers_moe_offload.builder.sources.model_class import names_in_memory
from transformers_moe_offload.builder.sweep.routers import Routers
from transformers_moe_offload.builder.sweep.scoring import HeldOut, held_out, score
from transformers_moe_offload.builder.texts.expert_texts import name_of
from transformers_moe_offload.builder.texts.windows import window_length
from transformers_moe_offload.builder.writing.folder import RECIPE_NAME
from transformers_moe_offload.errors import CheckpointError, MoeOffloadError, RecipeError
from transformers_moe_offload.untrusted import json_object

Advance = Callable[[int], None]
"""Called with the number of gates that were scored since the last call."""


@dataclass(frozen=True)
class SweepRow:
    """One gate on held-out text."""

    name: str
    bits_per_byte: Mapping[str, float]
    """Bits per byte of text, by domain."""
    sent_home: Mapping[int, float]
    """By layer: the share of tokens whose first choice is their domain's expert, a mean over the domains that have one;
    empty if none has."""
    entropy: Mapping[int, float]
    """By layer: entropy of the routing weights before the top k are taken, as a share of its maximum."""

    @property
    def mean_bits_per_byte(self) -> float:
        """The mean over domains, each with the same weight."""
        return fmean(self.bits_per_byte.values())

    @property
    def best_layer(self) -> tuple[int, float] | None:
        """The layer that sends most tokens home, and what share."""
        return max(self.sent_home.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class SweepReport:
    """All gates of a sweep."""

    rows: tuple[SweepRow, ...]

    @property
    def best(self) -> SweepRow:
        """The one with the fewest bits per byte over all domains."""
        return min(self.rows, key=lambda row: row.mean_bits_per_byte)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"best": self.best.name, "rows": [asdict(row) for row in self.rows]}

    def as_markdown(self) -> str:
        """The table, best first."""
        domains = list(self.rows[0].bits_per_byte)
        header = ["gate", *domains, "mean", "sent home, mean", "best layer", "entropy"]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        for row in sorted(self.rows, key=lambda row: row.mean_bits_per_byte):
            best = row.best_layer
            lines.append(
                [
                    row.name,
                    *(f"{row.bits_per_byte[domain]:.4f}" for domain in domains),
                    f"{row.mean_bits_per_byte:.4f}",
                    f"{fmean(row.sent_home.values()):.1%}" if best else "-",
                    f"{best[1]:.1%} ({best[0]})" if best else "-",
                    f"{fmean(row.entropy.values()):.2f}",
                ]
            )
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def sweep_gates(
    mixture: MoeRecipe | str | Path,
    gates: Mapping[str, Gate] | Sequence[str],
    texts: Mapping[str, Sequence[str]],
    *,
    built: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    advance: Advance | None = None,
) -> SweepReport:
    """Score gates for a mixture on held-out text.

    Args:
        mixture: a recipe, or the folder of a mixture that was built by one. The recipe in such a folder has the ids of
            models on the Hub, but of local folders the names without paths; with local models, give the recipe, and the
            folder as `built`.
        built: the folder of this recipe's mixture, which is not changed; None builds one in a temporary folder.
        gates: gates by their names in the report; or modes, with the other options of the recipe's gate.
        texts: held-out texts by domain. A domain with the name of an expert belongs to that expert: the share of its
            tokens that are sent there is counted.
        device: where the mixture runs, and the base model's layers while gates are computed.
        dtype: of the mixture.
        prepare: called with the mixture before each gate is scored, when the routers have the gate's rows and choose
            its number of experts; for instance to train the routers. Anything else it changes stays changed for the
            gates that follow.
        token: as in `from_pretrained`.
        local_files_only: as in `from_pretrained`.
        advance: called with 1 after each gate that is scored.
    """
    hub = {"token": token, "local_files_only": local_files_only}
    with tempfile.TemporaryDirectory(prefix="moe-offload-sweep-") as scratch:
        if isinstance(mixture, MoeRecipe):
            recipe, folder = mixture, Path(built or f"{scratch}/mixture")
        else:
            recipe, folder = recipe_of(Path(mixture)), Path(built or mixture)
        named = _named(gates, recipe)
        if folder.is_relative_to(scratch):
            flat = replace(recipe, gate=Gate(mode="gateless"))
            build_moe(flat, folder, device=device, token=token, local_files_only=local_files_only)
        plan = validate_recipe(recipe, **hub)  # type: ignore[arg-type]
        return _swept(plan, folder, named, texts, device=device, dtype=dtype, prepare=prepare, advance=advance)


def recipe_of(folder: Path) -> MoeRecipe:
    """The recipe that a mixture was built by."""
    try:
        return MoeRecipe.from_dict(json_object(folder / RECIPE_NAME).get("recipe"))  # type: ignore[arg-type]
    except MoeOffloadError as error:
        raise CheckpointError(
            f"{folder} is no mixture that was built here: cannot read its {RECIPE_NAME} ({error}); give the recipe"
        ) from error


def _named(gates: Mapping[str, Gate] | Sequence[str], recipe: MoeRecipe) -> dict[str, Gate]:
    if not isinstance(gates, Mapping):
        gates = {mode: replace(recipe.gate, mode=mode, scoring="ours") for mode in gates}
    if not gates:
        raise RecipeError("there are no gates to sweep; name some modes, as ['ridge', 'mean', 'gateless']")
    return dict(gates)


def _swept(
    plan: BuildPlan,
    folder: Path,
    gates: Mapping[str, Gate],
    texts: Mapping[str, Sequence[str]],
    *,
    device: str,
    dtype: torch.dtype | str,
    prepare: Callable[[PreTrainedModel], None] | None,
    advance: Advance | None,
) -> SweepReport:
    experts = plan.recipe.experts
    if not experts:
        raise RecipeError(
            f"kind: {plan.recipe.kind} has no experts with texts of their own, so there is nothing to sweep"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepared = {domain: held_out(of, tokenizer, length=window_length(plan.config)) for domain, of in texts.items()}
    homes = {name_of(expert, number): number for number, expert in enumerate(experts)}
    programmed = program_several(
        gates, experts, plan.base, tokenizer, plan.ffn, scores=plan.container.scores, device=device
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    names = names_in_memory(plan.config)
    routers = Routers(model, {layer: names[plan.container.router(layer)] for layer in plan.ffn}, plan.container.scores)
    rows = []
    for name, gate in gates.items():
        routers.set_rows(programmed[name].rows)
        every = gate.mode == "gateless"  # the mode means all experts at equal weight
        with routers.choosing(len(experts) if every else plan.recipe.experts_per_token):
            if prepare is not None:
                prepare(model)
            rows.append(_scored(name, model, routers, prepared, homes))
        if advance is not None:
            advance(1)
    return SweepReport(tuple(rows))


def _scored(
    name: str, model: torch.nn.Module, routers: Routers, texts: Mapping[str, HeldOut], homes: Mapping[str, int]
) -> SweepRow:
    bits, sent_home, entropies = {}, [], []
    for domain, text in texts.items():
        with routers.counting(homes.get(domain)) as counts:
            bits[domain] = score(model, text).bits_per_byte
        entropies.append(counts.entropies)
        if counts.sent_home is not None:
            sent_home.append(counts.sent_home)
    return SweepRow(name, bits, _mean(sent_home), _mean(entropies))


def _mean(by_layer: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {layer: fmean(one[layer] for one in by_layer) for layer in (by_layer[0] if by_layer else ())}
