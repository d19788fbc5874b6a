"""One sparse layer's experts in records of their own, and the arithmetic they stand for, pair by pair in float64."""

# T tokens, K experts per token, E experts, H hidden, I intermediate

from types import SimpleNamespace

import torch
from torch.nn import functional

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.store.record import RecordLayout


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


EXPERTS = SimpleNamespace(
    _apply_gate=swiglu, act_fn=torch.tanh, post_expert_norm=lambda out: out / 7 + 1, training=False
)


class Records:
    """Random experts, as records that lie where the tests want them."""

    def __init__(self, mlp, num_experts, hidden, intermediate, dtype=torch.float32, format=None, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.mlp, self.hidden, self.dtype, self.num_experts = mlp, hidden, dtype, num_experts
        first, second = mlp.matrices
        shapes = {first: (intermediate * (1 + mlp.has_gate), hidden), second: (hidden, intermediate)}
        name = str(dtype).removeprefix("torch.")
        fields = []
        for matrix, shape in shapes.items():
            fields.append(FieldSpec(matrix, shape[::-1] if mlp.is_transposed else shape, name))
            if mlp.has_bias:
                fields.append(FieldSpec(f"{matrix}_bias", shape[:1], name))
        self.codec = None if format is None else ExpertCodec(tuple(fields), format, mlp.is_transposed)
        self.layout = RecordLayout(fields if self.codec is None else self.codec.stored)
        self.codecs = LayerCodecs(self.codec)
        self.weights = []
        self.records = torch.full((num_experts, self.layout.row_bytes), 255, dtype=torch.uint8)
        for record in self.records:
            weights = {
                field.name: (torch.randn(field.shape, generator=random) / field.shape[-1] ** 0.5).to(dtype)
                for field in fields
            }
            parts = weights if self.codec is None else self.codec.encode(weights)
            for part, view in self.layout.views(record).items():
                view.copy_(parts[part])
            if self.codec is not None:  # what the codes stand for, before it is rounded to a dtype
                weights = self.codec.cast("float32").decode(parts)
            self.weights.append({field: weight.double() for field, weight in weights.items()})

    def addresses(self, device="cpu", wanted=None):
        """(E,) int64, zero for those that are not wanted."""
        self.on_device = self.records.to(device)
        addresses = [record.data_ptr() for record in self.on_device]
        if wanted is not None:
            addresses = [address if expert in wanted else 0 for expert, address in enumerate(addresses)]
        return torch.tensor(addresses, dtype=torch.int64, device=device)

    def held(self, experts):
        """Some experts as a cache hands them out."""
        return {expert: self.layout.views(self.records[expert]) for expert in experts}

    def inputs(self, tokens, choices, seed=0):
        """hidden_states (T, H), top_k_index (T, K) with an index too many, top_k_weights (T, K) with zeros."""
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, self.hidden, generator=random).to(self.dtype)
        index = torch.randint(0, self.num_experts + 1, (tokens, choices), generator=random)
        weights = torch.rand(tokens, choices, generator=random)
        weights[torch.rand(tokens, choices, generator=random) < 0.1] = 0
        return hidden, index, weights

    def by_loop(self, hidden, index, weights, experts=EXPERTS):
        """(T, H) float64, and how large the terms are that it is made of."""
        out = torch.zeros(len(hidden), self.hidden, dtype=torch.float64)
        terms = torch.zeros_like(out)
        for token, choice in torch.cartesian_prod(torch.arange(index.shape[0]), torch.arange(index.shape[1])).tolist():
            expert, weight = int(index[token, choice]), weights[token, choice].double()
            if 0 <= expert < self.num_experts and weight != 0:
                row = weight * self.mlp(experts, hidden[token : token + 1].double(), self.weights[expert])[0]
                out[token] += row
                terms[token] += row.abs().max()
        return out, terms

    def assert_agrees(self, found, inputs, experts=EXPERTS, rounding=None):
        """Within `rounding` of the largest number in each of the terms that are summed."""
        expected, terms = self.by_loop(*inputs, experts=experts)
        rounding = ROUNDING[self.dtype] if rounding is None else rounding
        assert found.dtype == self.dtype
        assert (found.cpu().double() - expected).abs().le(rounding * terms + 1e-9).all()


ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
"""Of a row, relative to its largest number: products, gates and rows are rounded one after another, and Triton's
interpreter cuts bfloat16 off instead of rounding it."""

GATED = ExpertMlp()
