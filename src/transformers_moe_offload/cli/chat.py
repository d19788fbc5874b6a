"""`moe-offload chat`: talk to a model whose experts are offloaded, and watch its cache."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import typer
from transformers import set_seed

from transformers_moe_offload.cli import formats, options
from transformers_moe_offload.cli.answer import Sampling, answer
from transformers_moe_offload.cli.failures import CommandError, expect_utf8, report
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.model.plan import readable

INTERRUPTED = 130
"""The exit code that shells give a program which Ctrl-C has ended."""


def chat(
    context: typer.Context,
    model: str,
    cache_budget: str,
    policy: str,
    arithmetic: str,
    experts: str | None,
    layers: list[str] | None,
    hot: str | None,
    trace: Path | None,
    hot_share: str | None,
    dense: str | None,
    lm_head: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    system: str | None,
    prompt: str | None,
    **typed: Unpack[options.Loading],
) -> None:
    """Load the model and answer prompts until there are no more."""
    asked = formats.parse_formats(experts, layers, hot, trace, hot_share, dense, lm_head)
    config = OffloadConfig(
        cache_budget=cache_budget,
        policy=policy,
        arithmetic=arithmetic,  # type: ignore[arg-type]
        experts=asked.experts,
        dense=asked.dense,
        lm_head=asked.lm_head,
    )
    sampling = Sampling(max_new_tokens, temperature, top_p)
    origin, loading = options.parse_loading(typed)
    if prompt is not None and not prompt.strip():
        raise CommandError("--prompt is empty; write something, or leave it out to be asked")
    if trace is not None:
        asked.expect_traced(meta_model(model, options.parse_dtype(typed["dtype"]), **origin))
    tokenizer = options.load_tokenizer(model, **origin)
    conversation = Conversation(tokenizer, system)
    with options.loaded(model, config, **loading) as offloaded:
        set_seed(seed)
        try:
            _talk(offloaded, tokenizer, conversation, prompt, sampling, context.command)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


class Conversation:
    """A chat so far, as inputs of the model. Without a chat template every prompt stands alone and is continued."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.kind = "chat" if self._has_template else "plain continuation, for there is no chat template"
        """What the model does with a prompt, in a word or two."""
        if system is not None and not self._has_template:
            raise CommandError("--system needs a model with a chat template, and this one only continues text")
        expect_utf8(system, "--system")
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, prompt: str) -> dict[str, Any]:
        """The inputs for `generate` that end with this prompt."""
        expect_utf8(prompt, "the prompt")
        inputs = self._in_template(prompt) if self._has_template else dict(self._tokenizer(prompt, return_tensors="pt"))
        if inputs["input_ids"].numel() == 0:  # Transformers makes an empty tokenizer where its files are missing
            raise CommandError(
                "the tokenizer makes no tokens of the prompt; check that the model's folder has its files"
            )
        return inputs

    def answered(self, text: str) -> None:
        """Remember the answer, whole or stopped, for the next prompt."""
        if self._has_template:
            self._messages.append({"role": "assistant", "content": text})

    def _in_template(self, prompt: str) -> dict[str, Any]:
        self._messages.append({"role": "user", "content": prompt})
        try:
            inputs = self._tokenizer.apply_chat_template(
                self._messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template may raise anything, for example for a system message
            self._messages.pop()
            raise CommandError(f"the model's chat template refuses the conversation: {error}") from error
        return dict(inputs)


def _talk(
    model: Any, tokenizer: Any, conversation: Conversation, prompt: str | None, sampling: Sampling, command: Any
) -> None:
    """Answer `prompt`, or every line of stdin, or what is typed.

    At a terminal the conversation goes on after an error or a stopped answer; otherwise either one ends the command.
    """
    is_interactive = prompt is None and sys.stdin.isatty()
    if is_interactive:
        _greet(model, conversation)
    given = (line.rstrip("\n") for line in sys.stdin if line.strip()) if prompt is None else [prompt]
    for text in _typed() if is_interactive else given:
        try:
            reply = answer(model, tokenizer, conversation.ask(text), sampling)
        except MoeOffloadError as error:
            if not is_interactive:
                raise
            report(error, command)
            continue
        conversation.answered(reply.text)
        if reply.was_stopped and not is_interactive:
            raise typer.Exit(INTERRUPTED)


def _typed() -> Iterator[str]:
    """Prompts from a terminal, until the user leaves."""
    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # gives `input` a history and cursor keys
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if prompt.strip():
            yield prompt


def _greet(model: Any, conversation: Conversation) -> None:
    plan = model.moe_offload.plan
    typer.echo(
        f"{plan.num_slots} of {plan.num_experts} experts fit into the cache ({readable(plan.cache_bytes)} of "
        f"{readable(plan.expert_bytes)}); {conversation.kind}. Ctrl-C stops an answer, Ctrl-D leaves."
    )
