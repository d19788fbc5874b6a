"""lm-evaluation-harness with requests reordered for more cache hits; answers are computed by `HFLM`.

`--model hf-reuse` when the harness is started by `python -m transformers_moe_offload`. Everything else is inherited
from `HFLM` (0.4.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lm_eval.models.huggingface import HFLM
from transformers.utils.logging import tqdm

from transformers_moe_offload.routing.order import token_order

T = TypeVar("T")
Request = tuple[Any, list[int], list[int]]
"""The request as the harness's cache of answers keys it, the tokens of the context, and the tokens that are scored."""


class ReuseOrderedLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """`HFLM`, but requests that have tokens in common share batches and follow one another."""

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, which are reordered; the windows of a text stay together."""
        order = token_order([self.tok_encode(request.args[0]) for request in requests])
        found = super().loglikelihood_rolling([requests[number] for number in order], disable_tqdm)
        return put_back(found, order)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if override_bs is not None or not requests:  # the requests are a batch already
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        groups = _by_input(requests)
        size = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        order = token_order(list(groups))
        members, found = list(groups.values()), []
        asked = []
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Requests by reuse") as bar:
            for start in range(0, len(order), size):
                batch = [number for group in order[start : start + size] for number in members[group]]
                found += super()._loglikelihood_tokens([requests[number] for number in batch], True, size)
                asked += batch
                bar.update(len(batch))
        return put_back(found, asked)


def put_back(found: Iterable[T], order: Sequence[int]) -> list[T]:
    """Answers that were found in the given order, put back into the order of the requests."""
    return [answer for _, answer in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _by_input(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """The numbers of the requests by the tokens that the model reads for them: the harness runs equal inputs once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        groups.setdefault((*context, *continuation[:-1]), []).append(number)
    return groups
