"""Train LoRA on an offloaded model, evaluate another, and write down what came of it: MODEL OTHER OUTPUT BATCH.

In as many processes as are started.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_moe_offload import OffloadConfig, cache_stats, training


def main(model: str, other: str, output: str, batch: str) -> None:
    train(model, output, batch)
    evaluate(other, output)
    PartialState().wait_for_everyone()
    # Without tearing anything down: gloo's threads may abort the process or wait for it, and a wrapper that outlives
    # its process group waits for them with the interpreter's lock held, which they may need.
    os._exit(0)


def train(model: str, output: str, batch: str) -> None:
    torch.manual_seed(0)
    offloaded = AutoModelForCausalLM.from_pretrained(model, moe_offload=OffloadConfig(cache_budget="50%"))
    adapted = get_peft_model(offloaded, training.lora_config(offloaded, r=2, routers=True))
    ids = [(torch.arange(10) * (1 + index % 3) + index) % 90 for index in range(24)]
    arguments = TrainingArguments(
        output,
        max_steps=4,
        per_device_train_batch_size=int(batch),
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(adapted, arguments, train_dataset=[{"input_ids": one, "labels": one} for one in ids])
    trainer.train()
    PartialState().wait_for_everyone()  # so that pages are counted while all processes have them
    facts = {
        "world_size": trainer.args.world_size,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trained": digest(adapted),
        "slot_bytes": offloaded.moe_offload.plan.cache_bytes,
        "shared_bytes": shared_bytes(Path(model)),
    }
    Path(output, f"{trainer.args.process_index}.json").write_text(json.dumps(facts))


@torch.no_grad()
def evaluate(name: str, output: str) -> None:
    """By what Accelerate prepares."""
    accelerator = Accelerator(cpu=True)
    config = OffloadConfig(cache_budget="50%", arithmetic="exact")
    model = AutoModelForCausalLM.from_pretrained(name, moe_offload=config, device_map={"": str(accelerator.device)})
    texts = torch.tensor([[(7 * place + number) % 90 for place in range(9)] for number in range(8)])
    share = texts[accelerator.process_index :: accelerator.num_processes]
    prepared = accelerator.prepare(model).eval()
    losses = torch.stack([prepared(input_ids=text[None], labels=text[None]).loss for text in share])
    gathered = accelerator.gather(losses).view(accelerator.num_processes, -1).T.flatten()
    assert accelerator.unwrap_model(prepared) is model
    assert cache_stats(model).asked > 0
    if accelerator.is_main_process:
        Path(output, "evaluation.json").write_text(json.dumps([type(prepared).__name__, gathered.tolist()]))


def digest(model: torch.nn.Module) -> str:
    """Of all that has been trained, bit by bit."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.update(parameter.detach().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def shared_bytes(folder: Path) -> int:
    """Bytes of a folder's files that this process has mapped and another one, too (Linux)."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ":" not in line.split()[0]:
            is_ours = str(folder) in line
        elif is_ours and line.startswith("Shared_Clean:"):
            total += int(line.split()[1]) << 10
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
