"""What a recording says of the texts that a model has read, and reading some through a KV cache."""

import torch
from transformers import DynamicCache

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
