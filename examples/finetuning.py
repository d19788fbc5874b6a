"""What the three examples of fine-tuning share: text of a domain that the small model has never seen, a Trainer with a
progress bar, held-out loss before and after, and a plot.

`torchrun` and `accelerate launch` start the examples in several processes.

The domain is Perl, of which every Debian has some; `--text` takes any folder of your own.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from transformers_moe_offload import OffloadConfig, training

TINY_MOE = Path(__file__).parent / "models" / "tiny-moe"
PERL = ("/usr/share/perl", "/usr/share/perl-base", "/usr/lib/x86_64-linux-gnu/perl-base")
CONTEXT = 128
CONFIGS = {"model": "config.json", "adapter": "adapter_config.json"}
"""What an example writes, and the file by which a folder with it can be told."""


def parse(description: str, *, learning_rate: float, output: str, kind: str) -> argparse.Namespace:
    """The options of an example that writes a `kind` of `CONFIGS`, by default into the folder `output`."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_MOE), help="a folder or a Hub id (default: the small one here)")
    parser.add_argument("--text", type=Path, help="a folder of text files to learn (default: Perl on this machine)")
    parser.add_argument("--cache-budget", default="50%", help="memory for experts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="where results go (default: %(default)s)")
    options = parser.parse_args()
    others = [other for other, config in CONFIGS.items() if other != kind and (options.output / config).exists()]
    if others:
        parser.error(
            f"{options.output} holds {others[0]} files, which would be loaded together with this {kind}; "
            f"name another folder with --output"
        )
    return options


def load(options: argparse.Namespace) -> tuple:
    """The offloaded model, and held-out and training blocks of tokens."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, moe_offload=OffloadConfig(cache_budget=options.cache_budget)
    )
    blocks = blocks_of(AutoTokenizer.from_pretrained(options.model), texts(options.text))
    num_held_out = max(4, min(32, len(blocks) // 10))
    return model, blocks[:num_held_out], blocks[num_held_out:]


def texts(folder: Path | None) -> list[str]:
    roots = [folder] if folder else [Path(root) for root in PERL]
    patterns = ("**/*.*",) if folder else ("**/*.pm", "**/*.pl")
    files = sorted({path for root in roots for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    found = [path.read_text(encoding="utf-8", errors="ignore")[:50_000] for path in files[:400]]
    if not found:
        raise SystemExit(f"there is no text in {', '.join(map(str, roots))}; name a folder of your own with --text")
    return found


def blocks_of(tokenizer, found: list[str]) -> list[dict[str, torch.Tensor]]:
    """Windows of tokens, in an order that is fixed but mixes the files."""
    # Not verbose: a file is longer than the model's context, but its windows are not.
    ids = torch.cat([tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in found])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": windows[place], "labels": windows[place]} for place in order.tolist()]


def run(model, options: argparse.Namespace, held_out: list, train: list) -> tuple[float, float]:
    """Train what is trainable; prints and returns held-out loss before and after, and draws the losses."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{num_trained:,} parameters are trained on {len(train):,} blocks of {CONTEXT} tokens")
    arguments = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=options.learning_rate,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="cosine",
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[training.MoeOffloadCallback()]
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        draw([entry for entry in trainer.state.log_history if "loss" in entry], options.output, before, after)
        print(f"held-out loss: {before:.3f} before, {after:.3f} after")
    return before, after


def save(model, options: argparse.Namespace, kind: str) -> None:
    """Write the model, with its tokenizer, or the adapter, once however many processes have trained it."""
    if PartialState().is_main_process:
        model.save_pretrained(options.output)
        if kind == "model":
            AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
        print(f"the {kind} is in {options.output}")


def exit_status(before: float, after: float) -> int:
    """0 if the held-out loss has fallen; 1 otherwise, which it says."""
    if after < before:
        return 0
    if PartialState().is_main_process:
        print(f"exit status 1: held-out loss did not fall ({before:.3f} before, {after:.3f} after)", file=sys.stderr)
    return 1


def draw(log: list[dict], output: Path, before: float, after: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], label="training")
    axis.plot([0, log[-1]["step"]], [before, after], "o", label="held out")
    axis.set(xlabel="step", ylabel="nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "loss.png", dpi=90, bbox_inches="tight")
    print(f"the losses are drawn in {output / 'loss.png'}")
