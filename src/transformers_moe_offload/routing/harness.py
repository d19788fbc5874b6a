"""lm-evaluation-harness with its requests in an order in which the cache serves more; the answers are its own.

Started by `python -m transformers_moe_offload`, the harness knows it as `--model hf-reuse`. Everything else is `HFLM`'s
(0.4.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lm_eval.models.huggingface import HFLM
from transformers.utils.logging import tqdm

from transformers_moe_offload.routing.order import token_order

T = TypeVar("T")
Request = tuple[Any, list[int], list[int]]
"""What is asked, for the harness's own notes; the tokens of the context, and those that are scored."""


class ReuseOrderedLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """`HFLM`, but requests that have tokens in common are answered together and one after another."""

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, which are reordered; their windows stay together."""
        order = token_order([self.tok_encode(request.args[0]) for request in requests])
        found = super().loglikelihood_rolling([requests[number] for number in order], disable_tqdm)
        return put_back(found, order)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if override_bs is not None or not requests:  # batches that were made already
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
    """Answers that were found in some order, in the order of the questions."""
    return [answer for _, answer in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _by_input(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """The numbers of the requests by what the model reads for them: the harness runs each of these once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        groups.setdefault((*context, *continuation[:-1]), []).append(number)
    return groups
