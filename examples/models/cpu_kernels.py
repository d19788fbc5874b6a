"""Arithmetic that trains the small models fast on a CPU with bf16 matrix units; the saved models do not depend on it.

Measured on one core (AVX-512, AMX; torch 2.13.0, transformers 5.23.0; the MoE of `train_moe.py`, 4096 tokens a step),
in tokens per CPU second: stock `eager` experts 1,150, stock `grouped_mm` 2,470, these 3,300. On the trained model the
losses of one batch differ by 0.0007 nats (2.9185 stock fp32, 2.9192 here). `evaluate.py` runs stock code only.
"""

# B sequences, N attention heads, S positions, D head dim
# T tokens, K experts per token, E experts, H hidden, V vocabulary

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "bmm_causal"
ROWS = 128
"""Rows of an expert's matmul are padded to this multiple: oneDNN compiles a kernel for every new shape, which cost
more than the arithmetic (1.5 s of 2.6 s a step) when each batch brought new row counts."""


@cache
def causal_bias(length: int) -> Tensor:
    """(S, S) bf16, very negative above the diagonal."""
    return torch.full((length, length), -1e9).triu(1).to(torch.bfloat16)


def bmm_causal_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, scaling: float, **__):
    """Causal attention of packed windows by two batched matmuls, half the time of flash SDPA forward + backward here.

    query (B, N, S, D), key and value (B, N / groups, S, D) -> (B, S, N, D). The attention mask is ignored.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    q = query.to(torch.bfloat16).reshape(batch * heads, length, dim)
    k, v = (t.to(torch.bfloat16).repeat_interleave(groups, 1).reshape(batch * heads, length, dim) for t in (key, value))
    bias = causal_bias(length).expand(batch * heads, length, length)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)
    mixed = torch.bmm(scores.softmax(-1), v).view(batch, heads, length, dim)
    return mixed.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, bmm_causal_attention)


def sorted_experts_forward(self: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts' output with rows sorted by expert, each expert's rows padded to a multiple of ROWS.

    Replaces the forward of the stock experts module. hidden (T, H), top_k_index (T, K) int64, top_k_weights (T, K)
    -> (T, H) bf16.
    """
    num_tokens, top_k = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=self.num_experts)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    row = torch.arange(num_tokens * top_k) + shift[chosen[order]]
    row_of_choice = torch.empty_like(order)
    row_of_choice[order] = row
    sizes = padded.tolist()
    token_of_row = torch.zeros(sum(sizes), dtype=torch.long)
    token_of_row[row] = order // top_k
    gate_up, down = (w.to(torch.bfloat16).unbind(0) for w in (self.gate_up_proj, self.down_proj))
    rows = hidden.to(torch.bfloat16).index_select(0, token_of_row).split(sizes)
    gate, up = torch.cat([functional.linear(x, w) for x, w in zip(rows, gate_up, strict=True)]).chunk(2, -1)
    inner = (functional.silu(gate) * up).split(sizes)
    output = torch.cat([functional.linear(x, w) for x, w in zip(inner, down, strict=True)])
    weights = top_k_weights.to(torch.bfloat16).unsqueeze(-1)
    return (output.index_select(0, row_of_choice).view(num_tokens, top_k, -1) * weights).sum(1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean next-token loss from hidden states, with its gradients, 256 rows of logits at a time.

    The full (T, V) table of logits falls out of the caches: its softmax took 0.4 s of a 1.3 s step of `tiny-dense`.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden (T, H) float, weight (V, H) float, labels (T,) int64 -> () float."""
        h, w = hidden.detach().to(torch.bfloat16), weight.detach().to(torch.bfloat16)
        grad_hidden, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
        total = torch.zeros(())
        for begin in range(0, len(h), 256):
            rows = slice(begin, begin + 256)
            target = labels[rows, None]
            logits = (h[rows] @ w.T).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            probability = logits.sub_(log_sum).exp_()
            probability.scatter_add_(1, target, torch.full_like(target, -1, dtype=probability.dtype))
            grad = probability.to(torch.bfloat16)
            grad_hidden[rows] = grad @ w
            grad_weight += grad.T @ h[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.num_rows = len(h)
        return total / len(h)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.num_rows
        return grad_hidden.float() * scale, grad_weight * scale, None


def with_fast_experts(model: nn.Module) -> nn.Module:
    """The same model, whose experts modules now run `sorted_experts_forward`."""
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            module.forward = sorted_experts_forward.__get__(module)
    return model
