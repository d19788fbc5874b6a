"""Turn prompts into inputs of the model: a chat where the tokenizer has a template, plain text otherwise."""

from __future__ import annotations

from typing import Any

from transformers_moe_offload.cli.failures import CommandError, expect_utf8


class Conversation:
    """A chat so far. Without a chat template every prompt stands alone and is continued."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self._has_template:
            raise CommandError("--system needs a model with a chat template, and this one only continues text")
        expect_utf8(system, "--system")
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def kind(self) -> str:
        """What the model does with a prompt, in a word or two."""
        return "chat" if self._has_template else "plain continuation, for there is no chat template"

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
