"""A linear layer with its weight in low bits."""

# N outputs, K inputs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload import kernels
from transformers_moe_offload.config import HqqFormat
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.hf.read_only import ReadOnlyTensor
from transformers_moe_offload.kernels import Activations
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing
from transformers_moe_offload.kernels.reference import dequantize


class DecodedWeight(ReadOnlyTensor):
    """A decoded packed weight, or a view of it. Writing to it raises, because the packed weight would not change.

    So PEFT's merging, `weight.data += ...` and the like fail instead of having no effect.
    """

    @classmethod
    def refusal(cls) -> Exception:
        """A packed weight cannot be changed."""
        return no_merge("this linear layer")


def no_merge(name: str) -> ConfigError:
    """The error for attempts to change a packed weight."""
    return ConfigError(
        f"the weight of {name} is in low bits (OffloadConfig.dense or lm_head) and constant: nothing can be merged "
        f"into it or written to it; restore() the model first, or write a merged checkpoint with training.save_merged"
    )


def no_training(name: str) -> ConfigError:
    """The error for attempts to train a packed weight."""
    return ConfigError(
        f"the weight of {name} is in low bits (OffloadConfig.dense or lm_head) and constant, so that it cannot be "
        f"trained; load the model without that format, or put an adapter on it"
    )


class HqqLinear(nn.Linear):
    """A linear layer with a packed weight, stored in the buffers `weight_codes`, `weight_scale` and so on.

    `weight` is decoded anew at each access and read-only. Casting the layer changes the dtype that it decodes to, not
    the buffers.
    """

    def __init__(
        self, packing: Packing, *, bias: bool, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packing.cols, packing.rows
        self.packing = packing
        self._dtype = dtype
        self.activations: Activations = "exact"
        for part in packing.parts:
            empty = torch.empty(part.shape, dtype=torch_dtype(part.dtype), device=device)
            self.register_buffer(f"weight_{part.name}", empty)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(packing.rows, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def quantize(cls, linear: nn.Linear, format: HqqFormat) -> HqqLinear:
        """A packed copy of a linear layer, on the same device; raises `ConfigError` if groups do not fit its inputs."""
        matrix = quantize(linear.weight.detach(), format)
        weight = linear.weight
        made = cls(matrix.packing, bias=linear.bias is not None, dtype=weight.dtype, device="meta")
        for name, part in matrix.parts.items():
            setattr(made, f"weight_{name}", part.to(weight.device))
        made.bias = linear.bias
        return made.train(linear.training)

    @property
    def matrix(self) -> PackedMatrix:
        """The packed weight."""
        return PackedMatrix(
            self.packing, {part.name: getattr(self, f"weight_{part.name}") for part in self.packing.parts}
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight, (N, K)."""
        return self._decoded().as_subclass(DecodedWeight)

    def _decoded(self) -> Tensor:
        return dequantize(self.matrix, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        out = kernels.linear(rows, self.matrix, activations=self.activations).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def requires_grad_(self, requires_grad: bool = True) -> HqqLinear:
        """As of any module, but True is refused: the weight would not be trained, as PEFT's `modules_to_save` asks."""
        if requires_grad:
            raise no_training("this linear layer")
        super().requires_grad_(requires_grad)
        return self

    def settle(self) -> None:
        """Undo Transformers' cast to float32 of buffers whose names match parameters that stay in float32."""
        for part in self.packing.parts:
            name = f"weight_{part.name}"
            self._buffers[name] = getattr(self, name).to(torch_dtype(part.dtype))

    def dequantized(self) -> nn.Linear:
        """An ordinary linear layer with the decoded weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._decoded())
        linear.bias = self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in held.items():
            moved, plain = self._buffers[name], before[name]
            if moved is not None and plain is not None and moved.dtype != dtype:
                self._buffers[name] = plain.to(moved.device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """As in `nn.Linear`, with bits and group size."""
        return f"{super().extra_repr()}, nbits={self.packing.nbits}, group_size={self.packing.group_size}"
