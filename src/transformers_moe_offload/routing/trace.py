"""`RoutingTrace`: a recording of the routing, with its statistics, cache trace and tables (the only use of pyarrow)."""

# N tokens at one router, K experts per token, E experts

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.routing import measures, routed_experts
from transformers_moe_offload.routing.contrast import ExpertContrast, contrast_of
from transformers_moe_offload.routing.recorded_texts import RecordedTexts, recorded_texts
from transformers_moe_offload.routing.sites import facts_of, find_sites, unwrapped
from transformers_moe_offload.routing.statistics import RouterStatistics, preferences_of, statistics_of, sureness_of
from transformers_moe_offload.routing.trace_data import RecordedRouting, rows_of
from transformers_moe_offload.routing.trace_file import Part
from transformers_moe_offload.tracing import RecordedVisit, Trace, TraceError, hottest_experts

if TYPE_CHECKING:
    import pandas
    import pyarrow


_NO_IDS, _NO_EXPERTS = np.empty(0, np.int32), np.empty((0, 1), np.int16)
"""Tokens and choices of an empty trace."""


class RoutingTrace(RecordedRouting):
    """Routers' decisions for every token of some forwards."""

    def statistics(self, router: int) -> RouterStatistics:
        """A router's entropy, margin and confidence, the load of its experts, and transitions between them."""
        self._check_router(router)
        return statistics_of(self, router)

    def summary(self) -> list[dict[str, Any]]:
        """The figures of `statistics` for every router, a dictionary each."""
        return [
            {"router": self.routers[router].router, **self.statistics(router).figures()}
            for router in range(len(self.routers))
        ]

    def preferences(self, router: int) -> NDArray[np.float64]:
        """How often each domain chose each expert, 1 being the router's average: (domains, E)."""
        self._check_router(router)
        return preferences_of(self, router)

    def agreement(self, other: RoutingTrace) -> list[float]:
        """For each router, how much the choices of two runs over the same tokens agree: the mean Jaccard index."""
        paths, others = ([(facts.path, facts.num_experts) for facts in trace.routers] for trace in (self, other))
        if paths != others:
            raise TraceError(
                f"the traces are of models with different routers ({len(paths)} and {len(others)} of them); compare "
                f"two recordings of one model"
            )
        agreements = []
        for router, (_, num_experts) in enumerate(paths):
            both = [[*trace.rows(router)] for trace in (self, other)]
            ids, other_ids = (np.concatenate([_NO_IDS, *(rows.token_ids for rows in many)]) for many in both)
            if not np.array_equal(ids, other_ids):
                raise TraceError(
                    f"the traces hold {len(ids)} and {len(other_ids)} tokens, but not the same tokens in the same "
                    f"order; record both runs on the same texts"
                )
            here, there = (measures.stacked([_NO_EXPERTS, *(rows.experts for rows in many)], -1) for many in both)
            total = sum(
                float(measures.jaccard(here[block], there[block], num_experts).sum())
                for block in measures.blocks(len(ids), num_experts)
            )
            agreements.append(total / len(ids) if len(ids) else 1.0)
        return agreements

    def token_counts(self) -> dict[str, list[int]]:
        """How many tokens chose each expert, by the path of the experts module; padding is left out.

        So are experts without weights and choices of weight zero. A token counts once for each call of the router in
        its forward.
        """
        loads = [np.zeros(facts.num_with_weights, np.int64) for facts in self.routers]
        for part in self.parts():
            for router, load in enumerate(loads):
                rows = rows_of(part, router)
                counts = (rows.experts >= 0) & (rows.experts < len(load)) & (rows.weights != 0)  # (N, K)
                load += np.bincount(rows.experts[counts], minlength=len(load))
        load_of = {facts.router: load.tolist() for facts, load in zip(self.routers, loads, strict=True)}
        return {path: list(load_of[facts.router]) for _, path, facts in self.sparse_layers()}

    def hottest(self, share: float | str) -> dict[str, list[int]]:
        """The experts that most tokens chose: a share of those recorded, as `Trace.hottest`."""
        counts = self.token_counts()
        return hottest_experts({layer: counts[path] for layer, path, _ in self.sparse_layers()}, share)

    def contrast(self, domain: str, other: str) -> ExpertContrast:
        """Which experts one domain chooses more often than the other, and whether chance explains it.

        Its `steering()` are options of strategy `steer`. SteerMoE, Fayyaz et al. 2025, section 3.1 (arXiv 2509.09660).
        """
        return contrast_of(self, domain, other)

    @property
    def texts(self) -> list[int]:
        """The numbers of the texts that were recorded from their beginning."""
        return [int(text) for text in np.unique(self.whole_texts.text)]

    def token_ids(self, text: int) -> NDArray[np.int64]:
        """The tokens of a text, without padding."""
        texts = self.whole_texts
        found: NDArray[np.int64] = texts.token_ids[texts.text == text]
        return found

    def routed_experts(self, text: int, *, num_layers: int | None = None) -> NDArray[np.int16]:
        """The experts of each token of a text: (tokens, layers, top_k), as trainers take the routes of a rollout.

        Layers are the sparse ones; with `num_layers`, all of the decoder, where the dense ones have -1.
        """
        return routed_experts.exported(self, self.whole_texts, text, num_layers)

    @classmethod
    def from_routed_experts(
        cls, model: Any, token_ids: Sequence[ArrayLike], routed_experts: Sequence[ArrayLike]
    ) -> Self:
        """A trace made of the routes of texts, as vLLM, SGLang and others return them; for strategy `replay`.

        Args:
            model: the model, plain or offloaded, for which the routes are meant.
            token_ids: the tokens of each text, prompt included, without padding.
            routed_experts: integers (tokens, layers, top_k) for each text, the last token's row or none. Layers are the
                sparse ones or all of the decoder. A token whose row is -1 has no route.
        """
        return cls._imported(model, token_ids, routed_experts)

    def save_routed_experts(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens and routes of all texts into one .npz file: token_ids, routed_experts and num_tokens."""
        routed_experts.write_file(path, [(self.token_ids(text), self.routed_experts(text)) for text in self.texts])

    @classmethod
    def load_routed_experts(cls, model: Any, path: str | os.PathLike[str]) -> Self:
        """Read a file of `save_routed_experts`, or one with the same arrays."""
        return cls._imported(model, *routed_experts.read_file(path))

    @classmethod
    def _imported(cls, model: Any, token_ids: Sequence[ArrayLike], routes: Sequence[ArrayLike]) -> Self:
        base = unwrapped(model)
        routers = [facts_of(site) for site in find_sites(base)]
        config = getattr(base, "config", None)
        text_config = config.get_text_config() if config is not None else None
        num_layers = getattr(text_config, "num_hidden_layers", None)
        index, part = routed_experts.imported(type(base).__name__, routers, token_ids, routes, num_layers)
        return cls(index, [part])

    @cached_property
    def whole_texts(self) -> RecordedTexts:
        """The texts that were recorded from their beginning, in memory."""
        return recorded_texts(self)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for every token and router. Needs the extra `research`."""
        return self.to_arrow().to_pandas()

    def to_arrow(self) -> pyarrow.Table:
        """A row for every token and router, with its experts and weights. Needs the extra `research`.

        Columns: router, token_id, sequence, position, turn, domain, experts, weights and, where scores were recorded,
        entropy, margin and confidence. `turn` counts the router's earlier calls with the same token in the same
        forward.
        """
        try:
            import pyarrow
        except ImportError as error:
            raise TraceError(
                "tables need pyarrow and pandas; run: pip install 'transformers-moe-offload[research]'"
            ) from error
        routers = range(len(self.routers))
        tables = [pyarrow.table(_columns(self, part, router, pyarrow)) for part in self.parts() for router in routers]
        if not tables:
            raise TraceError("the trace holds 0 forwards; run the model while it is recorded")
        return pyarrow.concat_tables(tables, promote_options="default")

    def to_cache_trace(self) -> Trace:
        """The visits that an offloaded model would make for these decisions, for `tracing.replay`.

        The order of experts within a visit is that of our own arithmetic, `compute/token_grouping.py`. Layers that run
        Transformers' own forward ask in ascending order instead; their hits may differ where a visit wants more experts
        than there are slots.
        """
        layers = self.sparse_layers()
        place = {layer: number for number, (layer, _, _) in enumerate(layers)}
        num_experts = tuple(facts.num_with_weights for _, _, facts in layers)
        per_token = tuple(facts.top_k for _, _, facts in layers if facts.top_k is not None)
        known = per_token if layers and len(per_token) == len(layers) else None
        trace = Trace(tuple(path for _, path, _ in layers), num_experts, experts_per_token=known)
        for part in self.parts():
            for router, first, num_rows, step, _ in part["calls"].tolist():
                facts = self.routers[router]
                chosen = part[f"experts.{router}"][first : first + num_rows].astype(np.int64)
                weights = part[f"weights.{router}"][first : first + num_rows]
                index = torch.from_numpy(np.where(chosen < 0, facts.num_experts, chosen))
                grouping = group_by_expert(index, torch.from_numpy(weights.copy()), facts.num_with_weights)
                if step == len(trace.step_tokens):  # each forward has a call
                    trace.step_tokens.append(0)
                trace.step_tokens[step] = max(trace.step_tokens[step], num_rows)
                trace.visits += [
                    RecordedVisit(place[layer], tuple(grouping.by_last_use), step) for layer in facts.layers
                ]
        return trace


def _columns(trace: RoutingTrace, part: Part, router: int, arrow: Any) -> dict[str, Any]:
    rows = rows_of(part, router)
    kept = rows.experts >= 0
    ends = np.r_[0, kept.sum(axis=1).cumsum()].astype(np.int32)
    names = np.array([*trace.domains, None], dtype=object)
    columns = {
        "router": np.full(len(kept), trace.routers[router].router, np.int32),
        "token_id": rows.token_ids,
        "sequence": rows.sequence,
        "position": rows.position,
        "turn": rows.turn,
        "domain": arrow.array(names[rows.domain], arrow.string()),
        "experts": arrow.ListArray.from_arrays(ends, rows.experts[kept]),
        "weights": arrow.ListArray.from_arrays(ends, rows.weights[kept]),
    }
    return columns | sureness_of(trace, rows, router)
