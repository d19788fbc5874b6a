"""Program the routers of a mixture: from the experts' texts to the routers' rows.

The texts go through the base model layer by layer, so that neither the model nor the text need fit into memory; one
pass serves any number of gates. `rows.py` and `mergekit.py` compute the rows.
"""

# E experts, H hidden

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_moe_offload.builder.gates.calibration import Seen, calibrate, embedding_rows
from transformers_moe_offload.builder.gates.fitted import Fitted, Gates, unscaled_gates
from transformers_moe_offload.builder.gates.mergekit import expect_mergekit, mergekit_rows
from transformers_moe_offload.builder.gates.rows import (
    NEED_SECOND_MOMENT,
    READ,
    Scores,
    drawn_rows,
    programmed_rows,
    targets,
)
from transformers_moe_offload.builder.gates.statistics import About, LayerStatistics, RidgeStatistics, StatisticsWriter
from transformers_moe_offload.builder.recipe import Expert, Gate
from transformers_moe_offload.builder.recipe.routers import BAKED, DRAWN
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.expert_texts import Texts, expect_texts
from transformers_moe_offload.builder.texts.windows import Windows, random_windows, window_length, windows_of
from transformers_moe_offload.errors import RecipeError

Advance = Callable[[int], None]
"""Called with the number of decoder layers done since the last call."""


def program_gates(
    gate: Gate,
    experts: Sequence[Expert],
    base: Source,
    tokenizer: Any,
    ffn: Mapping[int, str],
    *,
    scores: Scores = "softmax",
    statistics: Path | None = None,
    device: str = "cpu",
    advance: Advance | None = None,
) -> Gates:
    """The rows of every router.

    Args:
        gate: how they are computed.
        experts: in the order of their rows.
        base: the dense model whose attention, embeddings and norms the mixture has.
        tokenizer: the base model's.
        ffn: module paths of the feed-forward blocks that become experts, by layer: `model.layers.3.mlp`.
        scores: how the container's routers turn logits into scores.
        statistics: a file for the statistics that ridge gates are computed from; `add_expert_gate` starts from it.
        device: where the base model's layers run, one at a time.
        advance: called with the number of decoder layers just done; without it there is a progress bar.
    """
    keep = None if statistics is None else (gate.mode, statistics)
    several = program_several(
        {gate.mode: gate}, experts, base, tokenizer, ffn, scores=scores, keep=keep, device=device, advance=advance
    )
    return several[gate.mode]


def program_several(
    gates: Mapping[str, Gate],
    experts: Sequence[Expert],
    base: Source,
    tokenizer: Any,
    ffn: Mapping[int, str],
    *,
    scores: Scores = "softmax",
    keep: tuple[str, Path] | None = None,
    device: str = "cpu",
    advance: Advance | None = None,
) -> dict[str, Gates]:
    """The same for several gates by name, with one pass of the texts through the base model for all but mergekit's.

    `keep` names the ridge gate whose statistics are kept, and their file.
    """
    texts = [Texts.of(expert, number) for number, expert in enumerate(experts)]
    ours = {name: gate for name, gate in gates.items() if gate.scoring == "ours"}
    for gate in gates.values():
        _expect_possible(gate, texts)
    if keep is not None and (keep[0] not in ours or ours[keep[0]].mode != "ridge"):
        raise RecipeError(f"gate.mode={gates[keep[0]].mode!r} has no statistics to keep; only ridge has")
    names = [expert.name for expert in texts]
    windows = _windows(list(ours.values()), texts, base, tokenizer)
    programs = {name: _Program(gate, names, windows, base, ffn, scores) for name, gate in ours.items()}
    sites = _sites(list(ours.values()))
    with ExitStack() as stack:
        writer = None
        if keep is not None and windows is not None:
            about = About(
                experts=tuple(names),
                tokens=windows.counts[::2],
                sampled=windows.sampled,
                layers=tuple(sorted(ffn)),
                hidden_size=base.config.hidden_size,
                base=base.name,
                scores=scores,
                gate=ours[keep[0]],
            )
            writer = StatisticsWriter(keep[1], about)
            stack.enter_context(writer)

        def take(layer: int, seen: Seen) -> None:
            for program in programs.values():
                program.take(layer, seen)
            if writer is not None and keep is not None:
                writer.write_layer(layer, statistics_of(seen, ours[keep[0]].site))

        if sites and windows is not None:
            calibrate(windows, base, ffn, sites, take, device=device, advance=advance)
        done = {name: program.gates() for name, program in programs.items()}
    for name, gate in gates.items():
        if gate.scoring == "mergekit":
            rows = mergekit_rows(gate, texts, base, tokenizer, ffn, device=device, advance=advance)
            done[name] = unscaled_gates(gate, names, rows, scores)
    if keep is not None:
        done[keep[0]] = replace(done[keep[0]], statistics=RidgeStatistics(keep[1]))
    return {name: done[name] for name in gates}


def statistics_of(seen: Seen, site: str) -> LayerStatistics:
    """The statistics that ridge gates of one layer are computed from."""
    sums = seen.sums[site]
    assert sums.second_moment is not None
    return LayerStatistics(sums.second_moment, targets(sums), seen.sample, seen.home)


class _Program:
    """One gate; its rows are computed layer by layer, or known before."""

    def __init__(
        self,
        gate: Gate,
        names: Sequence[str],
        windows: Windows | None,
        base: Source,
        ffn: Mapping[int, str],
        scores: Scores,
    ) -> None:
        self._gate = gate
        tokens = () if windows is None or gate.mode in DRAWN else windows.counts[::2]
        self._fitted = Fitted(gate, names, tokens, scores)
        self._known: dict[int, Tensor] = {}
        if gate.mode in DRAWN:
            config = base.config
            rows = drawn_rows(
                gate.mode,
                config.num_hidden_layers,
                len(names),
                config.hidden_size,
                seed=gate.seed,
                initializer_range=getattr(config, "initializer_range", 0.02),
            )
            self._known = {layer: rows[layer] for layer in sorted(ffn)}
        elif gate.mode == "cheap_embed":
            assert windows is not None
            rows = embedding_rows(windows, base, next(iter(ffn.values())), center=gate.center)
            self._known = dict.fromkeys(sorted(ffn), rows)

    def take(self, layer: int, seen: Seen) -> None:
        rows = self._known.pop(layer, None)
        if rows is None:
            rows = programmed_rows(self._gate, seen.sums[self._gate.site])
        self._fitted.add(layer, rows, seen.sample, seen.home)

    def gates(self) -> Gates:
        for layer, rows in self._known.items():  # no pass was needed
            self._fitted.add(layer, rows)
        return self._fitted.gates()


def _expect_possible(gate: Gate, texts: Sequence[Texts]) -> None:
    if gate.mode == BAKED:
        raise RecipeError(
            "gate mode 'baked' is what bake_adapters writes: rows of a mixture of adapters, which no recipe has; call "
            "it on the mixture's folder, or set gate.mode to another"
        )
    if gate.scoring == "mergekit":
        expect_mergekit(gate, texts)
    elif gate.mode not in (*DRAWN, "base_first"):
        if len(texts) < 2:
            raise RecipeError(f"gate mode {gate.mode!r} has nothing to choose from with one expert; set it to gateless")
        expect_texts(texts, gate.mode)


def _windows(gates: Sequence[Gate], texts: Sequence[Texts], base: Source, tokenizer: Any) -> Windows | None:
    """The texts' tokens, or random ones if no expert has texts; None if all gates are drawn."""
    readers = [gate for gate in gates if gate.mode not in DRAWN]
    if not readers:
        return None
    if len({gate.skip_bos for gate in readers}) > 1:
        raise RecipeError("gates that are programmed together differ in skip_bos; give all of them the same")
    if all(expert.is_empty for expert in texts):
        return random_windows(len(texts), base.config.vocab_size, readers[0].seed)
    return windows_of(texts, tokenizer, length=window_length(base.config), skip_bos=readers[0].skip_bos)


def _sites(gates: Sequence[Gate]) -> dict[str, bool]:
    sites: dict[str, bool] = {}
    for gate in gates:
        if gate.mode in READ:
            sites[gate.site] = sites.get(gate.site, False) or gate.mode in NEED_SECOND_MOMENT
    return sites
