"""Build a model's prefetcher from its routers and the number of experts per token."""

# T tokens, H hidden

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.config import PrefetchConfig
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.routers.probe import RouterProbe, find_probe
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.prefetch.controller import Controller
from transformers_moe_offload.prefetch.predictors import LayerShape, make_predictor
from transformers_moe_offload.prefetch.prefetcher import Prefetcher

logger = logging.getLogger(__name__)


class Lookahead:
    """Prefetching for one model. `caches` and `specs` by sparse layer, in the order in which a token passes them."""

    def __init__(
        self,
        model: Any,
        config: PrefetchConfig,
        caches: Mapping[int, ExpertCache],
        specs: Mapping[int, ExpertSpec],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        found = {layer: find_probe(model, spec.name) for layer, spec in specs.items()}
        self._probes: dict[int, RouterProbe] = {layer: probe for layer, probe in found.items() if probe is not None}
        shapes = [LayerShape(layer, spec.num_experts, _top_k(model, spec)) for layer, spec in specs.items()]
        routers = {layer: probe.scores_of_residual for layer, probe in self._probes.items()}
        predictor = config.predictor
        if predictor == "next_router" and not routers:
            logger.warning(f"no router of {type(model).__name__} could be read; prefetching by 'transition' instead")
            predictor = "transition"
        self.prefetcher = Prefetcher(
            make_predictor(predictor, shapes, routers),
            caches,
            lookahead=config.lookahead,
            min_confidence=config.min_confidence,
            max_bytes=config.max_nbytes,
            record_bytes={layer: spec.expert_nbytes for layer, spec in specs.items()},
            controller=Controller if config.adaptive else None,
            clock=clock,
        )

    def started(self, layer: int, hidden: Tensor) -> Callable[[Sequence[int]], None]:
        """The callback to call with the experts that a layer wants, once its own loads are in flight.

        hidden (..., H) is the input of the layer's experts.
        """

        def look_ahead(wanted: Sequence[int]) -> None:
            num_tokens = hidden.numel() // hidden.shape[-1]
            if not self.prefetcher.is_on(num_tokens):
                self.prefetcher.visited(layer, wanted, None, num_tokens)
                return
            probe = self._probes.get(layer)
            with torch.no_grad():
                residual = None if probe is None else probe.residual(hidden.reshape(num_tokens, -1))
                self.prefetcher.visited(layer, wanted, residual, num_tokens)

        return look_ahead


def look_ahead_in(
    model: Any, config: PrefetchConfig | None, caches: Mapping[int, ExpertCache], specs: Mapping[int, ExpertSpec]
) -> Lookahead | None:
    """Prefetching as configured; None without a config, or with fewer than two sparse layers."""
    if config is None or len(specs) < 2:
        return None
    return Lookahead(model, config, caches, specs)


def _top_k(model: Any, spec: ExpertSpec) -> int:
    """How many experts a token takes; 2 if the model does not say."""
    return min(experts_per_token(model, spec.name) or 2, spec.num_experts)
