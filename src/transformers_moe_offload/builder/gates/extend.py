"""Ridge gates of an existing model with one expert more or one less, from the statistics that were kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.gates.calibration import Seen, calibrate
from transformers_moe_offload.builder.gates.fitted import Fitted, Gates
from transformers_moe_offload.builder.gates.program import Advance, statistics_of
from transformers_moe_offload.builder.gates.rows import centred, ridge_rows
from transformers_moe_offload.builder.gates.statistics import About, LayerStatistics, RidgeStatistics, StatisticsWriter
from transformers_moe_offload.builder.recipe import Expert
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.expert_texts import Texts, expect_texts
from transformers_moe_offload.builder.texts.windows import window_length, windows_of
from transformers_moe_offload.errors import RecipeError

logger = logging.getLogger(__name__)


def add_expert_gate(
    statistics: RidgeStatistics,
    expert: Expert,
    base: Source,
    tokenizer: Any,
    ffn: Mapping[int, str],
    path: Path | str,
    *,
    device: str = "cpu",
    advance: Advance | None = None,
) -> Gates:
    """Gates for all experts and one more, from the new one's texts alone: the same as from all texts at once.

    `path` is the file for the new statistics; it must not be the one that is read.
    """
    about = statistics.about
    texts = [Texts.of(expert, len(about.experts))]
    expect_texts(texts, "ridge")
    _expect_same_model(statistics, base, ffn)
    windows = windows_of(texts, tokenizer, length=window_length(base.config), skip_bos=about.gate.skip_bos)
    grown = replace(
        about,
        experts=(*about.experts, texts[0].name),
        tokens=(*about.tokens, windows.counts[0]),
        sampled=about.sampled + windows.sampled,
    )
    rewriting = _Rewriting(Path(path), grown)
    with rewriting:

        def take(layer: int, seen: Seen) -> None:
            rewriting.take(layer, statistics.layer(layer).with_expert(statistics_of(seen, about.gate.site)))

        calibrate(windows, base, ffn, {about.gate.site: True}, take, device=device, advance=advance)
        gates = rewriting.fitted.gates()
    return replace(gates, statistics=RidgeStatistics(path))


def drop_expert_gate(statistics: RidgeStatistics, expert: int, path: Path | str) -> Gates:
    """Gates for all experts but one. No text is needed; the dropped expert's texts remain in the second moment.

    `path` is the file for the new statistics; it must not be the one that is read.
    """
    about = statistics.about
    num_experts = len(about.experts)
    if not 0 <= expert < num_experts or num_experts < 2:
        raise RecipeError(f"cannot drop expert {expert} of {num_experts} in {statistics.path}; they count from 0")
    shrunk = replace(
        about,
        experts=about.experts[:expert] + about.experts[expert + 1 :],
        tokens=about.tokens[:expert] + about.tokens[expert + 1 :],
        sampled=int((statistics.layer(about.layers[0]).home != expert).sum()),
    )
    rewriting = _Rewriting(Path(path), shrunk)
    with rewriting:
        for layer in about.layers:
            rewriting.take(layer, statistics.layer(layer).without_expert(expert))
        gates = rewriting.fitted.gates()
    return replace(gates, statistics=RidgeStatistics(path))


class _Rewriting(StatisticsWriter):
    """Writes new statistics, and computes the rows that follow from them."""

    def __init__(self, path: Path, about: About) -> None:
        super().__init__(path, about)
        self._gate = about.gate
        self.fitted = Fitted(about.gate, about.experts, about.tokens, about.scores)

    def take(self, layer: int, statistics: LayerStatistics) -> None:
        self.write_layer(layer, statistics)
        rows = ridge_rows(statistics.second_moment, statistics.targets, self._gate.regularization)
        self.fitted.add(layer, centred(rows, self._gate.center), statistics.sample, statistics.home)


def _expect_same_model(statistics: RidgeStatistics, base: Source, ffn: Mapping[int, str]) -> None:
    about = statistics.about
    layers, hidden_size = tuple(sorted(ffn)), base.config.hidden_size
    if (layers, hidden_size) != (about.layers, about.hidden_size):
        raise RecipeError(
            f"{statistics.path} is about layers {list(about.layers)} with hidden size {about.hidden_size}, but the "
            f"model has experts in layers {list(layers)} and hidden size {hidden_size}; were the statistics "
            f"made for another model?"
        )
    if base.name != about.base:
        logger.warning(
            "Gate statistics in %s are of hidden states of %s, and the new expert's will be of %s; they should be the "
            "same model.",
            statistics.path,
            about.base,
            base.name,
        )
