"""Train LoRA on an offloaded model and write the losses: MODEL OUTPUT BATCH, in as many processes as started it."""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_moe_offload import OffloadConfig, training


def main(model: str, output: str, batch: str) -> None:
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
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(output, "losses.json").write_text(json.dumps([trainer.args.world_size, losses]))


if __name__ == "__main__":
    main(*sys.argv[1:])
