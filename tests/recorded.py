"""What a recording says of the texts that a model has read, and reading some through a KV cache."""

from typing import NamedTuple

import torch
from transformers import DynamicCache

from transformers_moe_offload import routing
from transformers_moe_offload.hf.upstream import kv_cache_parameter


def texts_of(trace, router=0):
    """(token, position) of every token that is no padding, by sequence."""
    found = {}
    for rows in trace.rows(router):
        for token, sequence, position in zip(rows.token_ids, rows.sequence, rows.position, strict=True):
            found.setdefault(int(sequence), []).append((int(token), int(position)))
    return list(found.values())


def placed(ids, first=0):
    return [(token, first + place) for place, token in enumerate(ids)]


def read(model, rows, past=None):
    """Read a batch; gives its cache."""
    past = DynamicCache() if past is None else past
    model(torch.tensor(rows), use_cache=True, **{kv_cache_parameter(type(model).forward): past})
    return past


PROMPTS = torch.tensor([[0, 0, 11, 12, 13], [0, 21, 22, 23, 24], [31, 32, 33, 34, 35]])
MASK = (PROMPTS != 0).long()


def recording(model, run, **options):
    with routing.record_routing(model, **options) as recorder, torch.no_grad():
        run()
    return recorder.trace


def generation(model, **options):
    settings = {"attention_mask": MASK, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(PROMPTS, **settings)


class Apart(NamedTuple):
    """Of tokens that rollouts have read and training has read again."""

    tokens: int
    routes: int
    """Tokens and layers with other experts."""


def routes_apart(rollouts, trained) -> Apart:
    """Compare what two recordings have of the same texts; each text of `trained` has to be one of the rollouts."""
    known = {tuple(rollouts.token_ids(text).tolist()): rollouts.routed_experts(text) for text in rollouts.texts}
    tokens = routes = 0
    for text in trained.texts:
        ids = trained.token_ids(text).tolist()
        of_rollout = next(
            own for read, own in known.items() if list(read[: len(ids) - 1]) == ids[: len(read)][: len(ids) - 1]
        )
        length = min(len(ids), len(of_rollout))
        one, other = (
            torch.from_numpy(own[:length]).sort(-1).values for own in (of_rollout, trained.routed_experts(text))
        )
        tokens += length
        routes += int((one != other).any(-1).sum())
    return Apart(tokens, routes)


def kl(rollout: torch.Tensor, trained: torch.Tensor) -> float:
    """Mean divergence of the second from the first: logits (T, V) each."""
    one, other = (logits.double().log_softmax(-1) for logits in (rollout, trained))
    return (one.exp() * (one - other)).sum(-1).mean().item()
