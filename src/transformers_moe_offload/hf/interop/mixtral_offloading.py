"""The prebuilt Mixtral of dvmazur/mixtral-offloading (arXiv 2312.17238), read as its own loader reads it.

`model.safetensors.index.json` names the file of the trunk and one file for each expert. In an expert's file, tensor
names have no prefix: `w1.W_q`, `w1.meta.scale` and so on. Codes are hqq's with axis 0 (`src/custom_layers.py`): a group
is g weights of one column, R rows apart. Bits and group size are not stored; they follow from the sizes of the arrays.
Scales and zeros may be quantized to 8 bits.
"""

# N rows (outputs), K columns (inputs), g group size, R = N / g groups in a column, f codes in a word

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.config import ExpertFormats, HqqFormat
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError, UnsupportedModelError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.codec import brought_together
from transformers_moe_offload.formats.hqq import in_half
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.prebuilt.layout import LayerContent
from transformers_moe_offload.hf.prebuilt.source import Quantization
from transformers_moe_offload.hub.fetch import Fetched
from transformers_moe_offload.kernels.packed import Packing, pack
from transformers_moe_offload.output.shards import Content
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.tensor_files.index import StoredTensor, WeightMap, read_header
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.untrusted import quoted

INDEX_NAME = "model.safetensors.index.json"
_TRUNK = "model.embed_tokens.weight"
_FIELDS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""Fields of an expert -> the matrices of that layout that make them up."""
_IN_AN_INT32 = 10
"""3-bit codes in an int32; the first one in the highest of the lower 30 bits."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of the layout."""

    name: str
    tensors: Mapping[str, StoredTensor]
    """Its arrays: `W_q`, `meta.scale` or `meta.scale_q` and so on."""
    rows: int
    cols: int

    @cached_property
    def nbits(self) -> int:
        """Bits of a code."""
        words = self._array("W_q")
        if words.dtype == "int32":
            return 3
        in_a_word, rest = divmod(self.rows * self.cols, max(1, prod(words.shape)))
        if words.dtype != "uint8" or rest or in_a_word not in (2, 4):
            raise CheckpointError(
                f"{self.name}.W_q is {words.dtype} {list(words.shape)}, which cannot be codes of 4, 3 or 2 bits of "
                f"{self.rows} x {self.cols} weights; the config does not belong to these weights"
            )
        return 8 // in_a_word

    @cached_property
    def group_size(self) -> int:
        """Weights that share a scale."""
        scales, zeros = (prod(self._array(f"meta.{name}", f"meta.{name}_q").shape) for name in ("scale", "zero"))
        size, rest = divmod(self.rows * self.cols, max(1, scales))
        if scales != zeros or rest or self.rows % size:
            raise CheckpointError(
                f"{self.name} has {scales} scales and {zeros} zeros, which do not fit groups of {self.rows} x "
                f"{self.cols} weights; the config does not belong to these weights"
            )
        return size

    @property
    def has_coded_meta(self) -> bool:
        """Whether scales or zeros are in 8 bits."""
        return "meta.scale_q" in self.tensors or "meta.zero_q" in self.tensors

    def codes(self) -> Tensor:
        """The codes, (N, K) uint8."""
        words = read_stored(self._array("W_q"))
        in_a_word = _IN_AN_INT32 if self.nbits == 3 else 8 // self.nbits
        shifts = [self.nbits * place for place in reversed(range(in_a_word))]
        fields = [(words >> shift & 2**self.nbits - 1).to(torch.uint8) for shift in shifts]
        if self._is_interleaved:
            return torch.stack(fields, 1).flatten(0, 1)[: self.rows]
        return torch.cat(fields).reshape(-1, self.cols)[: self.rows]

    def meta(self, name: str) -> Tensor:
        """The scales, or the zeros, (R, K) float32."""
        if f"meta.{name}_q" in self.tensors:
            codes = read_stored(self.tensors[f"meta.{name}_q"]).float()
            scale, zero = (
                read_stored(self._array(f"meta.meta_{name}.{part}")).float().view(-1) for part in ("scale", "zero")
            )
            values = (codes.reshape(-1, len(scale)) - zero) * scale
        else:
            values = read_stored(self._array(f"meta.{name}")).float()
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.name} has a {name} that is infinite or not a number; download it again")
        return values.reshape(-1, self.cols)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """The matrix decoded, (N, K)."""
        size = self.group_size
        weights = self.codes().float().view(size, -1, self.cols)
        return ((weights - self.meta("zero")) * self.meta("scale")).view(self.rows, self.cols).to(dtype)

    @property
    def _is_interleaved(self) -> bool:
        """Whether the codes in a word belong to neighbouring rows, as in the running model (`src/packing.py`).

        In published files they are packed as hqq packs groups, (g / f, R * K), where those rows are further apart.
        """
        in_a_word = _IN_AN_INT32 if self.nbits == 3 else 8 // self.nbits
        return self.group_size != self.rows and self.tensors["W_q"].shape == (-(-self.rows // in_a_word), self.cols)

    def _array(self, *names: str) -> StoredTensor:
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise CheckpointError(f"{self.name} has no {' or '.join(names)}; the checkpoint is incomplete")


@dataclass(frozen=True)
class MixtralOffloading:
    """A checkpoint in this layout, its headers read."""

    sparse_layers: Sequence[SparseLayer]
    trunk: Mapping[str, StoredTensor]
    experts: Mapping[tuple[int, int], Mapping[str, StoredTensor]]
    """By sparse layer and expert."""

    @classmethod
    def open(cls, folder: Path, model: Any) -> MixtralOffloading:
        """Read the headers of all files; `model` is on meta, with its experts taken out.

        Raises `CheckpointError` if the folder is in another layout or incomplete, `UnsupportedModelError` for a model
        that is not a Mixtral.
        """
        if model.config.model_type != "mixtral":
            raise UnsupportedModelError(
                f"the layout of mixtral-offloading is for Mixtral, but {folder} holds a {model.config.model_type}; "
                f"use `moe-offload quantize`"
            )
        layers = [layer_of(module) for module in model.modules() if isinstance(module, OffloadedExperts)]
        files = _files(folder)
        experts = {
            (layer.index, expert): _header(folder, files, f"{_stored_name(layer.name)}.{expert}.w1.W_q")
            for layer in layers
            for expert in range(layer.num_experts)
        }
        return cls(layers, _header(folder, files, _TRUNK), experts)

    def formats(self) -> ExpertFormats:
        """How the experts of every layer are quantized; all experts of a layer must have one format."""
        first, *others = [self._format(layer) for layer in self.sparse_layers]
        layers = {str(number): format for number, format in enumerate(others, 1) if format != first}
        return ExpertFormats(default=first, layers=layers)

    def has_coded_meta(self) -> bool:
        """Whether experts have scales or zeros in 8 bits, which are converted to float16."""
        return any(self._matrix(layer, 0, "w1").has_coded_meta for layer in self.sparse_layers)

    def contents(self, quantization: Quantization, _: Fetched) -> tuple[list[LayerContent], list[Content]]:
        """The content to write: sparse layers, in the formats that were found, and dense tensors."""
        layers = [
            LayerContent.coded(layer.name, layer.num_experts, codecs, partial(self._record, layer, codecs))
            for layer, codecs in zip(quantization.layers, quantization.codecs, strict=True)
        ]
        return layers, self._dense(quantization)

    def _dense(self, quantization: Quantization) -> list[Content]:
        """All other tensors; matrices in low bits are decoded."""
        contents, used = [], set()
        for name in quantization.saved_names():
            (spec,) = quantization.parts_of(name)
            stored = _stored_name(name)
            stem = stored.removesuffix("weight")
            parts = {key.removeprefix(stem): tensor for key, tensor in self.trunk.items() if key.startswith(stem)}
            read: Callable[[torch.dtype], Tensor]
            if stored in self.trunk:
                used.add(stored)
                read = partial(_plain, self.trunk[stored], spec.shape)
            elif "W_q" in parts:
                used |= {f"{stem}{part}" for part in parts}
                read = Matrix(stem.removesuffix("."), parts, *spec.shape).weights
            else:
                raise CheckpointError(f"the checkpoint holds nothing for {stored}; it is incomplete")
            contents.append(Content((spec,), partial(_named, spec, read)))
        unknown = sorted(self.trunk.keys() - used)
        if unknown:
            raise CheckpointError(
                f"the checkpoint holds {unknown[0]}, for which the model has no use; the config does not belong to "
                f"these weights"
            )
        return contents

    def _format(self, layer: SparseLayer) -> HqqFormat:
        kinds: dict[HqqFormat, str] = {}
        for expert in range(layer.num_experts):
            for name in chain(*_FIELDS.values()):
                matrix = self._matrix(layer, expert, name)
                format = HqqFormat(nbits=matrix.nbits, group_size=matrix.group_size, axis=0, meta_nbits=16)
                kinds.setdefault(format, matrix.name)
        if len(kinds) > 1:
            found = ", ".join(f"{name} in {format}" for format, name in kinds.items())
            raise UnsupportedModelError(f"the checkpoint has {found}; experts of one layer must be quantized alike")
        return next(iter(kinds))

    def _matrix(self, layer: SparseLayer, expert: int, name: str) -> Matrix:
        (field,) = (field for field in layer.fields if name in _FIELDS[field.name])
        rows, cols = field.shape
        tensors = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in self.experts[layer.index, expert].items()
            if key.startswith(f"{name}.")
        }
        full_name = f"{_stored_name(layer.name)}.{expert}.{name}"
        return Matrix(full_name, tensors, rows // len(_FIELDS[field.name]), cols)

    def _record(self, layer: SparseLayer, codecs: LayerCodecs, expert: int) -> Tensor:
        """One expert as a record in our format, uint8."""
        codec = codecs.of(expert)
        assert codec is not None
        layout = RecordLayout(codec.stored)
        record = torch.zeros(layout.nbytes, dtype=torch.uint8)
        views = layout.views(record)
        for field, names in _FIELDS.items():
            for part, values in _packed([self._matrix(layer, expert, name) for name in names]).items():
                views[f"{field}.{part}"].copy_(values)
        return record


def _packed(matrices: list[Matrix]) -> dict[str, Tensor]:
    """The arrays of a field that stacks these matrices along the rows."""
    size, nbits = matrices[0].group_size, matrices[0].nbits
    codes = torch.cat([brought_together(matrix.codes(), size) for matrix in matrices], 1)
    rows, cols = codes.shape
    packing = Packing(rows, cols, nbits, size, meta_nbits=16)
    meta = {name: in_half(torch.cat([matrix.meta(name).t() for matrix in matrices], 1)) for name in ("scale", "zero")}
    return pack(codes, packing) | meta


def _files(folder: Path) -> dict[str, str]:
    """The index: tensor name -> file name."""
    try:
        named = dict(WeightMap.read(folder / INDEX_NAME).files)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is not in the layout of mixtral-offloading: no readable {INDEX_NAME} ({error})"
        ) from error
    odd = next((file for file in named.values() if Path(file).name != file), None)
    if odd is not None:
        raise CheckpointError(
            f"{folder / INDEX_NAME} names {quoted(odd)}, which is not a plain file name in the folder"
        )
    return named


def _header(folder: Path, files: Mapping[str, str], name: str) -> dict[str, StoredTensor]:
    """All tensors of the file that holds the tensor `name`."""
    if name not in files:
        raise CheckpointError(
            f"{folder} is not in the layout of mixtral-offloading, or incomplete: {INDEX_NAME} does not name {name}"
        )
    return {tensor.name: tensor for tensor in read_header(folder / files[name])}


def _stored_name(name: str) -> str:
    """The name of a module or tensor in the layout."""
    return name.replace(".mlp.", ".block_sparse_moe.")


def _plain(tensor: StoredTensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.shape != shape:
        raise CheckpointError(
            f"the checkpoint holds {list(tensor.shape)} for {tensor.name}, but the model expects {list(shape)}; the "
            f"config does not belong to these weights"
        )
    return read_stored(tensor).to(dtype)


def _named(spec: FieldSpec, read: Callable[[torch.dtype], Tensor]) -> dict[str, Tensor]:
    return {spec.name: read(torch_dtype(spec.dtype))}
