"""Continue `tiny-dense` on one domain at a time: three LoRA adapters on the feed-forward linears only.

Attention, norms and embeddings stay the base's, which is what lets the specialists become the experts of one MoE.

    python train_specialists.py --work DIR   # needs tiny-dense/; writes tiny-dense-DOMAIN/ beside this file
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from cpu_kernels import ATTENTION
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from sources import DOMAINS
from training import TrainingConfig, train
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
BASE = "tiny-dense"


def adapter_config() -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=32,
        lora_alpha=64,
        lora_dropout=0.0,
        target_modules=["gate_proj", "up_proj", "down_proj"],
    )


def save(model: PeftModel, target: Path) -> None:
    """Write the adapter in bf16; the base is named, not located, so the folder can move."""
    shutil.rmtree(target, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.to(torch.bfloat16).save_pretrained(target, save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; ../README.md is the real one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder of corpus.py and train_tokenizer.py")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--domain", choices=DOMAINS, action="append", help="default: all three, one after the other")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: one per core")
    parser.add_argument("--out", type=Path, default=HERE, help="where model and curve go; default: beside this file")
    arguments = parser.parse_args()
    out = arguments.out
    torch.set_num_threads(arguments.threads)
    for domain in arguments.domain or DOMAINS:
        config = TrainingConfig(
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            domains=(domain,),
            warmup_steps=30,
            weight_decay=0.0,
            evaluate_every=100,
        )
        torch.manual_seed(config.seed)
        base = LlamaForCausalLM.from_pretrained(out / BASE, dtype=torch.float32)
        base.set_attn_implementation(ATTENTION)
        model = get_peft_model(base, adapter_config())
        name = f"{BASE}-{domain}"
        facts = train(model, config, arguments.work, out / f"curve-{name}.csv")
        save(model, out / name)
        (out / f"{name}-training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
