"""Expert stores over real, tiny safetensors files, in which every weight is the number of its expert."""

# E experts

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import LayerSource, ScatteredExpert
from transformers_moe_offload.tensor_files.index import StoredTensor, read_index

WIDTH = 3


def unopened(path: str | Path, nbytes: int = 0) -> File:
    """A file that need not exist, because it is never read."""
    return File(Path(path), FileIdentity(nbytes=nbytes, device=0, inode=0, modified_ns=None))


def number(expert: ExpertId) -> int:
    """What every weight of an expert is equal to: small enough to be exact in any dtype, and never zero."""
    return 16 * expert.layer + expert.expert + 1


def cut_short(path: Path, nbytes: int) -> None:
    """Take the end of a file away, which stays the same inode."""
    with path.open("r+b") as stream:
        stream.truncate(nbytes)


@contextmanager
def put_back(path: Path) -> Iterator[bytes]:
    """Inside the block, which is given a file's bytes, it may be written to; afterwards it is what it was, times
    included."""
    content, was = path.read_bytes(), path.stat()
    try:
        yield content
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def numbered_store(folder: Path, num_layers: int, num_experts: int) -> ExpertStore:
    """A store whose experts have a float32 and a bfloat16 tensor, filled with their numbers."""
    tensors = {}
    for layer in range(num_layers):
        numbers = torch.tensor([number(ExpertId(layer, expert)) for expert in range(num_experts)])
        tensors[f"{layer}.weight"] = numbers.float().reshape(-1, 1, 1).repeat(1, 2, WIDTH)
        tensors[f"{layer}.bias"] = numbers.bfloat16().reshape(-1, 1).repeat(1, WIDTH)
    return stacked_store(folder, tensors)


def stacked_store(folder: Path, tensors: dict[str, Tensor]) -> ExpertStore:
    """A store of layers whose fields lie stacked, (E, ...), under the names `{layer}.{field}`."""
    save_file(tensors, folder / "model.safetensors")
    index = read_index([folder / "model.safetensors"])
    layers = sorted({int(name.split(".")[0]) for name in tensors})
    return ExpertStore([_stacked_layer(layer, index) for layer in layers])


def _stacked_layer(layer: int, index: dict[str, StoredTensor]) -> LayerSource:
    stacks = {name.split(".", 1)[1]: stack for name, stack in index.items() if name.startswith(f"{layer}.")}
    num_experts = next(iter(stacks.values())).shape[0]
    fields = tuple(FieldSpec(name, stack.shape[1:], stack.dtype) for name, stack in stacks.items())
    sources = tuple(
        ScatteredExpert(
            tuple(FieldSource((stack.row(expert, num_experts),), (stack.dtype,)) for stack in stacks.values())
        )
        for expert in range(num_experts)
    )
    return LayerSource(ExpertSpec(layer, f"layers.{layer}.experts", num_experts, fields), sources)
