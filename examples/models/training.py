"""The training loop shared by the small models: windows, schedule, steps, held-out perplexity, curve.

Each `train_*.py` builds a model and calls `train`; saving the result is theirs. Arithmetic is in `cpu_kernels.py`.
"""

# T tokens, L layers, E experts, K experts per token

import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cpu_kernels import ChunkedCrossEntropy
from sources import DOMAINS
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how fast; the defaults are those of the shipped models."""

    steps: int
    learning_rate: float = 3e-3
    domains: tuple[str, ...] = DOMAINS
    tokens_per_step: int = 4096
    window: int = 256
    """Tokens in a training sequence; attention costs half of what 512 costs."""
    long_window: int = 512
    """Sequence length of the last `long_fraction` of the steps, so that all 512 positions are trained."""
    long_fraction: float = 0.15
    warmup_steps: int = 100
    final_fraction: float = 0.02
    """Learning rate at the end, as a fraction of its peak."""
    weight_decay: float = 0.1
    balance_weight: float = 0.0
    """Weight of the router's load-balancing loss."""
    seed: int = 0
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        if self.tokens_per_step % self.long_window or self.tokens_per_step % self.window:
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is no multiple of {self.window} and {self.long_window}; "
                "change it or the windows"
            )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to `final_fraction`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)

    def window_at(self, step: int) -> int:
        return self.long_window if step >= self.steps * (1 - self.long_fraction) else self.window


def token_ids(work: Path, domain: str, split: str) -> np.ndarray:
    """(N,) uint16, all files of a domain's split one after the other."""
    return np.load(work / "tokens" / f"{domain}-{split}.npy")


class Windows:
    """Training windows of one domain, each pass in a new order and from a new offset."""

    def __init__(self, ids: np.ndarray, generator: np.random.Generator) -> None:
        self.ids, self.generator = ids, generator
        self.starts: list[int] = []
        self.length = 0

    def next(self, length: int) -> np.ndarray:
        """(length + 1,) the window and the token after it."""
        if not self.starts or length != self.length:
            self.length = length
            offset = int(self.generator.integers(length))
            starts = np.arange(offset, len(self.ids) - length - 1, length)
            self.starts = self.generator.permutation(starts).tolist()
        start = self.starts.pop()
        return self.ids[start : start + length + 1]


def batches(config: TrainingConfig, work: Path) -> Iterator[Tensor]:
    """(B, S + 1) int64 for every step; the domains take turns, so each gives the same number of tokens."""
    generator = np.random.default_rng(config.seed)
    domains = [Windows(token_ids(work, domain, "train"), generator) for domain in config.domains]
    turn = 0
    for step in range(config.steps):
        length = config.window_at(step)
        rows = []
        for _ in range(config.tokens_per_step // length):
            rows.append(domains[turn % len(domains)].next(length))
            turn += 1
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, eq. 4), for each layer on its own, averaged.

    router_logits L x (T, E) -> (), 1 when every layer's load is uniform. Transformers' function pools the layers first,
    which lets an expert starve in one layer as long as its number is busy in another.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = probability.topk(top_k, -1).indices
        load = torch.bincount(chosen.reshape(-1), minlength=logits.shape[-1]) / chosen.numel()
        losses.append(logits.shape[-1] * (load * probability.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def held_out_perplexity(model: nn.Module, work: Path, domain: str, num_windows: int = 32, window: int = 256) -> float:
    """Perplexity on evenly spaced held-out windows: a progress figure; `evaluate.py` has the full one."""
    ids = token_ids(work, domain, "held_out")
    starts = np.linspace(0, len(ids) - window - 2, num_windows).astype(int)
    rows = torch.from_numpy(np.stack([ids[s : s + window + 1] for s in starts]).astype(np.int64))
    model.eval()
    losses = [language_loss(model, part)[0].item() for part in rows.split(16)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def language_loss(model: nn.Module, batch: Tensor, **kwargs) -> tuple[Tensor, object]:
    """Mean next-token loss of batch (B, S + 1), and the inner model's output. `kwargs` go to the inner model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = inner.model(input_ids=batch[:, :-1], use_cache=False, **kwargs)
    hidden = output.last_hidden_state
    labels = batch[:, 1:].reshape(-1)
    return ChunkedCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), inner.lm_head.weight, labels), output


def train(
    model: nn.Module, config: TrainingConfig, work: Path, curve: Path, save: Callable[[nn.Module], None] | None = None
) -> dict[str, float]:
    """Train `model` in place, write its curve (CSV) as it goes, call `save` at evaluations; facts of the run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    has_router = config.balance_weight > 0
    began = time.perf_counter()
    smooth: float | None = None
    rows: list[dict[str, float]] = []
    model.train()
    for step, batch in enumerate(batches(config, work)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        loss, output = language_loss(model, batch, **({"output_router_logits": True} if has_router else {}))
        balance = torch.zeros(())
        if has_router:
            balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + config.balance_weight * balance).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        done = step + 1
        if done % 10 == 0 or done == config.steps:
            row = {
                "step": done,
                "loss": loss.item(),
                "smooth_loss": smooth,
                "balance": balance.item(),
                "minutes": (time.perf_counter() - began) / 60,
            }
            if done % config.evaluate_every == 0 or done == config.steps:
                row |= {f"{d}_perplexity": held_out_perplexity(model, work, d) for d in DOMAINS}
                if save is not None:
                    save(model)
            rows.append(row)
            write_curve(curve, rows)
            speed = done * config.tokens_per_step / (60 * row["minutes"])
            print(json.dumps({k: round(v, 3) for k, v in row.items()}), f"{speed:.0f} tokens/s", flush=True)
    return {
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "minutes": round(rows[-1]["minutes"], 1),
    }


def write_curve(path: Path, rows: list[dict[str, float]]) -> None:
    columns = ["step", "loss", "smooth_loss", "balance", "minutes", *(f"{d}_perplexity" for d in DOMAINS)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
