"""Generate one answer, and show it token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList, TextStreamer

from transformers_moe_offload.cli.display import Display, Meter, make_display
from transformers_moe_offload.cli.interruption import Interruption


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None leaves a value to the model's generation config."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None

    def options(self) -> dict[str, Any]:
        """Keywords for `generate`; a temperature of 0 stands for greedy choice."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return options | chosen | ({"do_sample": True} if chosen else {})


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt."""

    text: str
    was_stopped: bool
    """Whether Ctrl-C ended it."""


def answer(model: Any, tokenizer: Any, inputs: dict[str, Any], sampling: Sampling) -> Answer:
    """Generate an answer to the inputs, and show it meanwhile."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    meter, display = Meter(model.moe_offload), make_display()
    try:
        with Interruption() as interruption:
            tokens = model.generate(
                **inputs,
                **sampling.options(),
                streamer=_Streamer(tokenizer, display, meter),
                stopping_criteria=StoppingCriteriaList([interruption]),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
    finally:
        display.close(meter.summary())
    new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
    return Answer(tokenizer.decode(new_tokens, skip_special_tokens=True), interruption.happened)


class _Streamer(TextStreamer):
    """Hands whole words to the display and counts tokens."""

    def __init__(self, tokenizer: Any, display: Display, meter: Meter) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._display = display
        self._meter = meter

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then one token at a time: value (1, T) or (1,) int64."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt:
            self._meter.count_token()
            self._display.status(self._meter.summary())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show decoded text."""
        self._display.write(text)
