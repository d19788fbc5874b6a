"""Read a window token by token, and note for each what it cost and what the model said of the next one.

Teacher-forced: every step reads the text's own token, so that all strengths are compared on the same text. In steps and
not in one forward, because experts are preferred in steps only; the loss of a prompt hides what that costs.
"""

# S tokens of a window, N = S - 1 of which are predicted, V tokens of the vocabulary

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.store.expert_store import ExpertStore

Values = NDArray[np.float64]


class Steps(NamedTuple):
    """What was measured of each predicted token, (N,) float64 each."""

    nats: Values
    """Its negative log-likelihood."""
    kl: Values
    """Kullback-Leibler divergence of the prediction from the one without a strategy, in nats."""
    agrees: Values
    """1 where the likeliest token is that of the model without a strategy, else 0."""
    seconds: Values
    """Time of the forward."""
    asked: Values
    """Experts asked for."""
    hits: Values
    """Experts that were resident."""
    nbytes: Values
    """Bytes of the experts that had to be loaded."""


class Meter:
    """Measures an offloaded model."""

    def __init__(self, model: Any, before_step: Callable[[], None], advance: Callable[[], None]) -> None:
        """`before_step` is called before every forward, while the clock stands still, and `advance` after it."""
        self._model = model
        self._before_step = before_step
        self._advance = advance
        runtime = model.moe_offload
        store = ExpertStore([runtime.source(layer) for layer in runtime.layers])
        self._bytes = {layer.name: store.stored_bytes(ExpertId(layer.index, 0)) for layer in runtime.layers}

    @torch.inference_mode()
    def read(self, window: Tensor, reference: Tensor | None) -> tuple[Steps, Tensor]:
        """The steps of a window (S,), and its log-probabilities (N, V) float32 on the host.

        `reference` are those of the model without a strategy; None while it reads the window itself.
        """
        self._model.moe_offload.clear()
        rows, predictions = [], []
        cache: dict[str, Any] = {}
        before = self._counts()
        for place in range(len(window) - 1):
            self._before_step()
            ids = window[None, place : place + 1].to(self._model.device)
            started = time.perf_counter()
            outputs = self._model(input_ids=ids, use_cache=True, **cache)
            logits = outputs.logits[0, -1].float().cpu()  # sync: device -> host
            seconds = time.perf_counter() - started
            cache = kv_cache_argument(self._model, outputs)
            if not cache:
                raise UnsupportedModelError(
                    f"{type(self._model).__name__} returns no KV cache, so it cannot read a text token by token"
                )
            after = self._counts()
            prediction = logits.log_softmax(-1)
            own = prediction if reference is None else reference[place]
            rows.append([
                -float(prediction[window[place + 1]]),
                float((own.exp() * (own - prediction)).nan_to_num(0).sum()),
                float(own.argmax() == prediction.argmax()),
                seconds,
                *(after - before),
            ])  # fmt: skip
            before = after
            predictions.append(prediction)
            self._advance()
        return Steps(*np.array(rows).T), torch.stack(predictions)

    def _counts(self) -> Values:
        """Experts asked for, hits, and bytes that had to be loaded, until now."""
        stats = self._model.moe_offload.stats()
        loaded = sum((one.misses + one.prefetch_used) * self._bytes[name] for name, one in stats.per_layer.items())
        return np.array([stats.asked, stats.hits, loaded], np.float64)
