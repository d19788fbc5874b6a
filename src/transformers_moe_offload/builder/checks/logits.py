"""Two comparisons of logits, in one pass through each of two models: the mixture that was written, and dense models.

Identity: a mixture whose experts are all copies of the base model's block must give the base model's logits, whatever
the router chooses. Forced expert: with every token routed to expert e, the mixture must give the logits of the dense
model with e's block.
The mixture's tensors are read from its files; the dense model's are read from the sources by the code that also wrote
the mixture, under other names. One layer, and in it one expert, are in memory at a time; matrices that are stored in
the dtype they are needed in are mapped from the page cache.
"""

# B texts: one for each expert, and one for the base model's block. T tokens in each, E experts, H hidden size,
# I inputs of a linear layer, O outputs

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from transformers_moe_offload.builder.checks import CheckFailedError
from transformers_moe_offload.builder.layerwise.streamed_model import Forward, StreamedModel
from transformers_moe_offload.builder.sources.checkpoint import read_rows
from transformers_moe_offload.builder.sources.model_class import experts_paths, names_in_memory, put
from transformers_moe_offload.builder.targets import ROLES
from transformers_moe_offload.builder.weights.blocks import Block, Part
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.tensor_files.index import StoredTensor
from transformers_moe_offload.tensor_files.reading import MappedTensors, read_stored

NUM_TOKENS = 12
"""In each text: enough for attention to matter, few enough that reading blocks takes longer than computing them."""
MAX_VOCABULARY = 128
"""Entries that are used, spread evenly: embeddings and head of a small model can be larger than all the rest."""
TOLERANCE = 1e-4
"""Of the largest logit. Rounding gives 1e-6 with small models and 1e-5 with deep ones; errors give 1e-2."""
_ROWS_BYTES = 4 * 2**20
"""Bytes in float32 of the rows that are widened at once. A matrix of 2048 times 5632 in bfloat16 and 12 tokens take 5.1
ms with this, 8.0 with 512 KiB, 6.6 with 16 MiB, and 27 when it is widened as a whole (one core of an EPYC, 2026-11)."""


def check_logits(reader: TensorReader, stored: Mapping[str, StoredTensor]) -> tuple[float, float]:
    """Compare, or raise `CheckFailedError`. Returns the largest differences: identity's, and of all forced experts."""
    plan = reader.plan
    vocabulary = _spread(plan.config.vocab_size)
    num_texts = plan.shape.num_experts + 1
    # The same text for all, so that only the block makes a difference.
    tokens = torch.randint(len(vocabulary), (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens = tokens.expand(num_texts, NUM_TOKENS)
    found = _mixture(reader, stored, vocabulary).logits(tokens)
    expected = _dense(reader, vocabulary).logits(tokens)
    differences = (found - expected).abs().amax(dim=(1, 2))
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    for number, difference in reversed(list(enumerate(differences.tolist()))):  # identity first: it is about the class
        if not difference <= allowed:  # also raises for NaN
            raise CheckFailedError(_message(reader, number, difference, allowed))
    return float(differences[-1]), float(differences[:-1].max())


def _message(reader: TensorReader, number: int, difference: float, allowed: float) -> str:
    plan = reader.plan
    off = f"logits differ by {difference:.2g}, and rounding explains at most {allowed:.2g}"
    if number == plan.shape.num_experts:
        return (
            f"identity: {plan.container.name} with copies of the blocks of {plan.base.name} as experts does not "
            f"reproduce {plan.base.name}: {off}; this model needs another container"
        )
    return f"forced expert: {plan.mixture.names[number]} alone does not reproduce its dense model: {off}"


def _spread(size: int) -> Tensor:
    """Some entries of a vocabulary, first and last among them: (V,) int64."""
    return torch.linspace(0, size - 1, min(size, MAX_VOCABULARY)).round().long().unique()


def _mixture(reader: TensorReader, stored: Mapping[str, StoredTensor], vocabulary: Tensor) -> StreamedModel:
    """The mixture, from its files."""
    plan = reader.plan
    on_disk = {name: disk for disk, name in names_in_memory(plan.config).items()}

    def read(name: str) -> Tensor:
        one = stored[on_disk[name]]
        if one.shape and one.shape[0] == plan.config.vocab_size and ".layers." not in name:
            return torch.cat([read_rows(one, row, row + 1) for row in vocabulary.tolist()])
        return read_stored(one)

    paths = experts_paths(plan.config)
    experts = {paths[layer]: _experts(reader, stored, layer) for layer in plan.shape.layers}
    return StreamedModel(plan.config, len(vocabulary), read, experts)


def _experts(reader: TensorReader, stored: Mapping[str, StoredTensor], layer: int) -> Callable[[nn.Module], Forward]:
    """Text n goes to expert n alone; the last one, with its own routing, to copies of the base model's block."""
    plan = reader.plan
    num_experts, base = plan.shape.num_experts, Block((Part(),))

    def forward_of(module: nn.Module) -> Forward:
        own = module.forward

        def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            """(B * T, H), (B * T, K) int64, (B * T, K) -> (B * T, H)."""
            texts = zip(*(one.chunk(num_experts + 1) for one in (hidden, top_k_index, top_k_weights)), strict=True)
            answers, mapped = [], MappedTensors()
            for number, (states, index, weights) in enumerate(texts):
                if number < num_experts:
                    index = torch.full_like(index[:, :1], number)
                    weights = torch.ones_like(weights[:, :1])
                    matrices = _stored_expert(reader, stored, layer, number, mapped)
                else:
                    matrices = {role: _rounded(reader, base, layer, role, mapped) for role in ROLES}
                gate_up = _joined(matrices["gate"], matrices["up"])
                put(module, "gate_up_proj", gate_up.expand(num_experts, *gate_up.shape))
                put(module, "down_proj", matrices["down"].expand(num_experts, *matrices["down"].shape))
                with WidenedProducts():
                    answers.append(own(states, index, weights))
                mapped.let_go()
            module.to("meta")
            return torch.cat(answers)

        return forward

    return forward_of


def _dense(reader: TensorReader, vocabulary: Tensor) -> StreamedModel:
    """The base model, with other blocks for each text."""
    plan = reader.plan
    dtypes = {tensor.spec.name: torch_dtype(tensor.spec.dtype) for tensor in plan.tensors}

    def read(name: str) -> Tensor:
        spec = plan.stems[0].tensors[name]
        if spec.shape and spec.shape[0] == plan.config.vocab_size and ".layers." not in name:
            rows = torch.cat([reader.stem_rows(name, row, row + 1) for row in vocabulary.tolist()])
            return rows.to(dtypes[name])
        return reader.stem(name).to(dtypes.get(name, plan.dtype))

    blocks = {plan.container.ffn(layer): _blocks(reader, layer) for layer in plan.shape.layers}
    return StreamedModel(plan.base.config, len(vocabulary), read, blocks)


def _blocks(reader: TensorReader, layer: int) -> Callable[[nn.Module], Forward]:
    plan, mixture = reader.plan, reader.plan.mixture
    names = {
        role: name.removeprefix(f"{plan.container.ffn(layer)}.")
        for role, name in plan.container.dense_matrices(layer).items()
    }

    def forward_of(module: nn.Module) -> Forward:
        own, mapped = module.forward, MappedTensors()

        def block(states: Tensor, block: Block) -> Tensor:
            for role, name in names.items():
                put(module, name, _rounded(reader, block, layer, role, mapped))
            with WidenedProducts():
                answer: Tensor = own(states)
            mapped.let_go()
            return answer

        def forward(hidden: Tensor) -> Tensor:
            """(B, T, H) -> (B, T, H)."""
            answers = []
            for number, states in enumerate(hidden.split(1)):
                is_base = number == plan.shape.num_experts
                sums = mixture.base_sum if is_base else mixture.sums[number]
                answer = torch.stack([block(states, one) for one in sums]).sum(0)
                if mixture.is_shared_gated and mixture.shared is not None:
                    gate = reader.shared_rows[layer].to(plan.dtype).float()
                    answer = answer + torch.sigmoid(states @ gate.T) * block(states, mixture.shared)
                answers.append(answer)
            module.to("meta")
            return torch.cat(answers)

        return forward

    return forward_of


def _stored_expert(
    reader: TensorReader, stored: Mapping[str, StoredTensor], layer: int, expert: int, mapped: MappedTensors
) -> dict[str, Tensor]:
    """The matrices of an expert, by role, from the files: (I, H), (I, H) and (H, I)."""
    shape, hidden_size = reader.plan.shape, reader.plan.config.hidden_size
    found = {}
    for name, matrices in reader.plan.container.experts(layer, shape.num_experts).items():
        for number, matrix in enumerate(matrices):
            if matrix.expert == expert:
                rows = (hidden_size, shape.width) if matrix.role == "down" else (shape.width, hidden_size)
                one = stored[name]
                # All matrices of a tensor are of one size.
                start = one.offset + number * one.nbytes // len(matrices)
                found[matrix.role] = mapped.tensor(replace(one, offset=start, shape=rows))
    return found


def _rounded(reader: TensorReader, block: Block, layer: int, role: str, mapped: MappedTensors) -> Tensor:
    """A matrix as the mixture has it, without channels of zeros."""
    stored = reader.blocks.stored(block, layer, role)
    if stored is not None and stored.dtype == dtype_name(reader.plan.dtype):
        return mapped.tensor(stored)
    return reader.blocks.matrix(block, layer, role).to(reader.plan.dtype)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """One matrix below another: (A, H), (B, H) -> (A + B, H); without a copy where they are neighbours in a file."""
    rows, width = len(first) + len(second), first.shape[1]
    are_neighbours = (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )
    return first.as_strided((rows, width), (width, 1)) if are_neighbours else torch.cat((first, second))


class WidenedProducts(TorchFunctionMode):
    """In this block, linear layers take weights of any dtype, and compute as if these were float32.

    A matrix is widened a few rows at a time, so that these are still in the processor's cache when they are multiplied.
    Widening a whole matrix moves many times as many bytes through memory, into pages that were never touched before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room = torch.empty(_ROWS_BYTES // 4)

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if func is functional.linear and not kwargs and args[0].dtype != args[1].dtype:
            answer = product(args[0], args[1], self._room)
            return answer if len(args) < 3 or args[2] is None else answer + args[2].float()
        return func(*args, **(kwargs or {}))


def product(states: Tensor, matrix: Tensor, room: Tensor) -> Tensor:
    """What `linear(states, matrix.float())` gives, up to rounding: (..., I) float32, (O, I) -> (..., O) float32.

    `room` is float32 of any size, for the rows that are widened.
    """
    num_outputs, num_inputs = matrix.shape
    step = max(1, room.numel() // num_inputs)
    if num_inputs > room.numel():
        room = torch.empty(num_inputs)
    answer = states.new_empty(*states.shape[:-1], num_outputs)
    for start in range(0, num_outputs, step):
        rows = matrix[start : start + step]
        wide = room[: rows.numel()].view(rows.shape).copy_(rows)
        answer[..., start : start + step] = functional.linear(states, wide)
    return answer
