"""The experts of a sparse layer as one call of the compiled kernels takes them: few rows, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from transformers_moe_offload.compute.activation import recognised
from transformers_moe_offload.compute.forward import opened
from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.formats.base import Codec, LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.kernels import gpu, native
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.grouped import Activation
from transformers_moe_offload.kernels.layer import LayerKernel, Workspace
from transformers_moe_offload.kernels.packed import PackedMatrix
from transformers_moe_offload.kernels.stored import Stored
from transformers_moe_offload.store.layer_source import Weights


def activation_for_one_call(
    mlp: ExpertMlp, experts: nn.Module, spec: ExpertSpec, codecs: LayerCodecs
) -> Activation | None:
    """What the kernel has to compute between both products of the module's experts; None if it cannot compute them.

    It takes matrices that are (out, in) or in low bits.
    """
    if native.library() is None or gpu.cpu_stands_in() or mlp.has_post_expert_norm:
        return None
    if sorted(field.name for field in spec.fields) != sorted(mlp.fields):
        return None
    if any(torch_dtype(field.dtype) not in TYPES for field in spec.fields):
        return None
    if not all(_takes(codec, mlp.is_transposed) for codec in codecs.kinds):
        return None
    return recognised(mlp, experts)


def _takes(codec: Codec | None, is_transposed: bool) -> bool:
    """Whether experts that are stored so are multiplied with where they are."""
    if codec is None:
        return not is_transposed
    if not isinstance(codec, ExpertCodec):
        return False
    return codec.is_packed or (codec.is_as_stored and not is_transposed)


class OneCall:
    """The kernel of one layer, and its table, which the cache keeps (`cache/table.py`)."""

    def __init__(
        self,
        mlp: ExpertMlp,
        spec: ExpertSpec,
        codecs: LayerCodecs,
        activation: Activation,
        workspace: Workspace,
        sure_for: float,
    ) -> None:
        """For layers that have an `activation_for_one_call`. `sure_for`: seconds after each use for which an expert
        need not be looked for again."""
        self._mlp = mlp
        self._codecs = codecs
        self._held: dict[int, ExpertWeights] = {}
        """The matrices of the experts in the table, which keep their memory alive."""
        fields = {field.name: field for field in spec.fields}
        kinds = [tuple(_stored(mlp, fields, codec, name) for name in mlp.matrices) for codec in codecs.kinds]
        rounds = mlp.activations == "int8"
        self.kernel = LayerKernel(
            spec.num_experts, kinds, activation, workspace, rounds=rounds, sure_for=sure_for  # type: ignore[arg-type]
        )  # fmt: skip

    def put(self, expert: int, weights: Weights, until: float) -> None:
        """An expert is resident."""
        matrices = self._held[expert] = opened(weights, self._codecs.of(expert))
        first, second = (matrices[name] for name in self._mlp.matrices)
        kind = int(expert in self._codecs.hot_experts)
        self.kernel.put(expert, kind, first, second, [self._bias(matrices, name) for name in self._mlp.matrices], until)

    def keep_until(self, expert: int, until: float) -> None:
        """A visit has found a resident where it was."""
        self.kernel.keep_until(expert, until)

    def take_away(self, expert: int) -> None:
        """An expert is not resident any more."""
        self.kernel.take_away(expert)
        self._held.pop(expert, None)

    def _bias(self, matrices: ExpertWeights, name: str) -> Tensor | None:
        bias = matrices[f"{name}_bias"] if self._mlp.has_bias else None
        assert not isinstance(bias, PackedMatrix)
        return bias


def _stored(mlp: ExpertMlp, fields: Mapping[str, FieldSpec], codec: Codec | None, name: str) -> Stored:
    """How a field of all experts with a codec is stored, (out, in)."""
    field, bias = fields[name], fields[f"{name}_bias"] if mlp.has_bias else None
    rows, cols = reversed(field.shape) if mlp.is_transposed else field.shape
    packing = codec.packing(name) if isinstance(codec, ExpertCodec) else None
    return Stored(rows, cols, packing, torch_dtype(field.dtype), None if bias is None else torch_dtype(bias.dtype))
