"""Tell a recorder of traces where the forwards of a model begin and end, and how many tokens they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from transformers_moe_offload.hf.upstream import arguments
from transformers_moe_offload.tracing import TraceRecorder


def announcing(model: nn.Module, recorder: TraceRecorder) -> list[RemovableHandle]:
    """Hooks that tell a recorder where the model's forwards begin and end; compiled forwards are not reported."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            recorder.begin_forward(_num_tokens(module, arguments(module, args, kwargs)))

    def end(*_: object) -> None:
        if not torch.compiler.is_compiling():
            recorder.end_forward()

    return [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]


def _num_tokens(model: nn.Module, given: Mapping[str, Any]) -> int:
    """How many tokens each sparse layer routes in a forward with these arguments; 0 if not known.

    In a forward that both encodes and decodes, the encoder's and decoder's layers route different numbers of tokens.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    decoder_ids = given.get("decoder_input_ids")
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if (ids is not None or embeds is not None) and (decoder_ids is not None or is_encoder_decoder):
        return 0  # without decoder_input_ids the decoder gets the labels, or the same tokens, shifted
    if ids is not None:
        return int(ids.numel())
    if embeds is not None:
        return int(embeds.shape[0] * embeds.shape[1])
    return 0 if decoder_ids is None else int(decoder_ids.numel())
