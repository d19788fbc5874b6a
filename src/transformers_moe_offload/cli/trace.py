"""`moe-offload trace`: record which experts real generations ask for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import set_seed

from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.answer import Interruption, Sampling, generate
from transformers_moe_offload.cli.chat import INTERRUPTED, Conversation
from transformers_moe_offload.cli.failures import CommandError, expect_utf8
from transformers_moe_offload.cli.writing import expect_file
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.routing import RoutingTrace, record_routing
from transformers_moe_offload.routing.trace_file import expect_new_folder
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.untrusted import reading


def trace(
    model: str,
    output: Path,
    prompt: list[str] | None,
    prompts: Path | None,
    routing: Path | None,
    overwrite: bool,
    cache_budget: str,
    policy: str,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    **typed: Unpack[options.Loading],
) -> None:
    """Generate from each prompt and record the experts that the layers wanted."""
    config = OffloadConfig(cache_budget=cache_budget, policy=policy)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    origin, loading = options.parse_loading(typed)
    texts = _texts(prompt, prompts)
    expect_file("--output", output)
    if routing is not None:
        expect_new_folder(routing, overwrite=overwrite)
    tokenizer = options.load_tokenizer(model, **origin)
    with reading(f"cannot load {model!r}"):
        inputs = [Conversation(tokenizer, None).ask(text) for text in texts]
    with options.loaded(model, config, **loading) as offloaded:
        set_seed(seed)
        with record_routing(offloaded, routing, overwrite=overwrite) if routing is not None else nullcontext():
            recorded, was_stopped = _record(offloaded, tokenizer, inputs, sampling)
    recorded.save(output)
    typer.echo(f"{output}: {recorded}")
    if routing is not None:
        typer.echo(f"{routing}: {RoutingTrace.load(routing)}")
    if was_stopped:
        raise typer.Exit(INTERRUPTED)


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    """The prompts of `--prompt`, or the lines of `--prompts`."""
    if (prompt is None) == (prompts is None):
        raise CommandError("give prompts either with --prompt, as often as you like, or as the lines of --prompts FILE")
    texts = prompt or []
    for text in texts:
        expect_utf8(text, "--prompt")
    if prompts is not None:
        with reading(f"cannot read --prompts {prompts}"):
            texts = prompts.read_text(encoding="utf-8").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CommandError("all prompts are blank; write something to generate from")
    return texts


def _record(model: Any, tokenizer: Any, inputs: list[dict[str, Any]], sampling: Sampling) -> tuple[Trace, bool]:
    """The trace of generating from each of the inputs, and whether Ctrl-C ended it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("tokens", total=len(inputs) * sampling.max_new_tokens)
    with progress, Interruption(lambda: progress.advance(task)) as interruption, model.moe_offload.trace() as recorded:
        for number, prompt in enumerate(inputs, start=1):
            generate(model, tokenizer, prompt, sampling, interruption)
            if interruption.happened:
                break
            progress.update(task, completed=number * sampling.max_new_tokens)
    per_token = [experts_per_token(model, name) for name in recorded.layer_names]
    if None not in per_token:
        recorded.experts_per_token = tuple(per_token)
    return recorded, interruption.happened
