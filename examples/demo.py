"""Watch a mixture-of-experts model write while most of its experts stay on disk.

    python examples/demo.py
    python examples/demo.py --cache-budget 10% --max-new-tokens 200

Loads the model with a cache for a part of its experts, lets it continue one prompt of each domain it was trained on,
and says what the cache did. Then loads the plain model, all experts in memory, and checks that it writes the same
tokens: with `arithmetic="exact"` there is nothing to tell the two apart by. Exits with status 1 if there is.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from transformers.utils import logging

from transformers_moe_offload import MoeOffloadError, OffloadConfig, cache_stats

TINY_MOE = os.path.relpath(Path(__file__).parent / "models" / "tiny-moe")

PROMPTS = {
    "prose": "If this option is set, the",
    "python": 'def read(path):\n    """',
    "C": "#ifndef _LINUX_QUEUE_H\n#define _LINUX_QUEUE_H\n\nstruct",
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.model,
            device_map=options.device,
            moe_offload=OffloadConfig(cache_budget=options.cache_budget, arithmetic="exact"),
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (MoeOffloadError, OSError, ValueError) as error:
        print(f"error: cannot load {options.model}: {error}", file=sys.stderr)
        return 2
    print(f"{options.model} with cache_budget={options.cache_budget!r}\n\n{model.moe_offload.plan}")

    written = {}
    for domain, prompt in PROMPTS.items():
        print(f"\n--- {domain} " + "-" * (76 - len(domain)))
        model.moe_offload.reset_stats()
        written[domain] = continuation(model, tokenizer, prompt, options.max_new_tokens, TextStreamer(tokenizer))
        print(f"--- {cache_stats(model)}")

    plain = AutoModelForCausalLM.from_pretrained(
        options.model, device_map=options.device, experts_implementation="eager"
    )
    for domain, prompt in PROMPTS.items():
        if not torch.equal(written[domain], continuation(plain, tokenizer, prompt, options.max_new_tokens)):
            print(f"\nFAILED: the plain model continues the {domain} prompt with other tokens", file=sys.stderr)
            return 1
    num_tokens = sum(len(tokens) for tokens in written.values())
    print(f"\nThe plain model, with all experts in memory, writes the same {num_tokens} tokens.")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default=TINY_MOE, type=folder_or_id, help="a folder or a Hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--cache-budget", default="25%", help="memory for experts, e.g. 25%%, 500MB, 6GiB (default: 25%%)"
    )
    parser.add_argument("--max-new-tokens", default=80, type=positive, help="for each prompt (default: %(default)s)")
    parser.add_argument("--device", default="cpu", type=device, help="where to compute (default: %(default)s)")
    return parser.parse_args(arguments)


def folder_or_id(text: str) -> str:
    """A model as `from_pretrained` takes it; what can only be a folder, and is none, is refused here."""
    looks_like_a_folder = text.count("/") > 1 or text.startswith((".", "/", "~"))
    if looks_like_a_folder and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of tokens")
    return int(text)


def device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a device: {error}") from None


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> torch.Tensor:
    """The tokens the model adds to the prompt: sampled if the model comes with settings for it, always with seed 0."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    set_seed(0)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
    return tokens[0, inputs["input_ids"].shape[1] :]


if __name__ == "__main__":
    sys.exit(main())
