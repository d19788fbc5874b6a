"""Train an OLMoE, a second model for cache-aware routing: 4 layers of 32 experts, 4 for each token, 768 KiB each.

    python -m benchmarks.routing.train_olmoe                # to the end, about half an hour on two cores
    python -m benchmarks.routing.train_olmoe --minutes 4    # as far as it comes; the same command goes on from there
    python -m benchmarks.routing.train_olmoe --quick        # every line of it once, a model that has learnt nothing

For `cache_aware.py --model`. Unlike the small trained model, it has the classes of OLMoE: a token's weights are not
divided by their sum, and a cache of a quarter of the experts holds twice as many as a token takes. Its experts are
large for its attention, so that a step from disk is mostly reading. It learns the text of `examples/models`, with its
tokenizer and by its loop.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from benchmarks import MADE, TINY_MOE

sys.path.append(str(TINY_MOE.parent))

from corpus import collect
from cpu_kernels import ATTENTION, with_fast_experts
from sources import DOMAINS
from train_tokenizer import CONTEXT, VOCAB_SIZE, packed
from training import TrainingConfig, balance_loss, batches, held_out_perplexity, language_loss

NAME = "olmoe-4x32"
STEPS = 1600
TOKENS_PER_STEP = 4096
SAID_EVERY = 20
"""Steps."""


def config_of(quick: bool) -> OlmoeConfig:
    """50 M parameters in experts, of which a token uses an eighth, and 2 M others."""
    hidden, layers, experts = (64, 2, 8) if quick else (256, 4, 32)
    return OlmoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        num_experts=experts,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def train_olmoe(
    quick: Annotated[bool, typer.Option("--quick", help="Two steps of a tiny model.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, of 4096 tokens each.")] = STEPS,
    minutes: Annotated[float, typer.Option(help="Stop after so long, and keep what the next run needs.")] = math.inf,
    text: Annotated[Path | None, typer.Option(help="A texts.json of examples/models/corpus.py.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
) -> None:
    """Train it, and save it in `made`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    folder, work = made / NAME, made / f"{NAME}.training"
    if (folder / "config.json").exists():
        print(f"{folder} is there already")
        return
    training = TrainingConfig(
        steps=2 if quick else steps,
        learning_rate=2e-3,
        tokens_per_step=512 if quick else TOKENS_PER_STEP,
        warmup_steps=60,
        balance_weight=0.02,
    )
    _write_tokens(text, work)
    model: Any = with_fast_experts(OlmoeForCausalLM(config_of(quick)))
    model.set_attn_implementation(ATTENTION)
    if _train(model, training, work, stop_at=time.monotonic() + 60 * minutes):
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="32MB")
        AutoTokenizer.from_pretrained(TINY_MOE).save_pretrained(folder)
        shutil.rmtree(work)


def _train(model: Any, config: TrainingConfig, work: Path, *, stop_at: float) -> bool:
    """Train to the end, from where the last run stopped. False if the time was up: then `work` has what is needed."""
    groups = [
        {"params": [one for one in model.parameters() if one.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [one for one in model.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    kept, begun = work / "state.pt", 0
    if kept.exists():
        state = torch.load(kept, mmap=True, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["step"]
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(batches(config, work)):
        if step < begun:
            continue
        if time.monotonic() > stop_at:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
            print(f"stopped before step {step} of {config.steps}; run the same command again to go on")
            return False
        loss = _step(model, optimizer, config, step, batch)
        if (step + 1) % SAID_EVERY == 0 or step + 1 == config.steps:
            speed = (step + 1 - begun) * config.tokens_per_step / (time.monotonic() - started)
            print(f"step {step + 1}: {loss:.3f} nats, {speed:.0f} tokens/s", flush=True)
    found = {domain: held_out_perplexity(model, work, domain, num_windows=8) for domain in DOMAINS}
    print("held-out perplexity:", json.dumps({domain: round(value, 1) for domain, value in found.items()}))
    return True


def _step(model: Any, optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int, batch: Tensor) -> float:
    """One optimizer step; the loss of its batch, in nats."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    loss, output = language_loss(model, batch, output_router_logits=True)
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)  # type: ignore[attr-defined]
    (loss + config.balance_weight * balance).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _write_tokens(text: Path | None, work: Path) -> None:
    """Each domain's split as token ids, where the loop of `examples/models` looks for them."""
    (work / "tokens").mkdir(parents=True, exist_ok=True)
    if all((work / "tokens" / f"{domain}-held_out.npy").exists() for domain in DOMAINS):
        return
    texts = collect() if text is None else json.loads(text.read_text())
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    for domain in DOMAINS:
        for split in ("train", "held_out"):
            np.save(work / "tokens" / f"{domain}-{split}.npy", packed(tokenizer, texts[domain][split]))


if __name__ == "__main__":
    typer.run(train_olmoe)
