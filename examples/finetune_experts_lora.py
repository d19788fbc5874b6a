"""Train LoRA on the routed experts and the attention of an offloaded mixture of experts.

    python examples/finetune_experts_lora.py --steps 60

Writes an adapter as PEFT does. It loads on the plain model, too: `PeftModel.from_pretrained(plain, folder)`.
"""

import sys

from finetuning import exit_status, load, parse, run, save
from peft import get_peft_model

from transformers_moe_offload import training


def main() -> int:
    options = parse(__doc__, learning_rate=3e-3, output="finetuned-lora", kind="adapter")
    model, held_out, train = load(options)
    adapted = get_peft_model(model, training.lora_config(model, r=4, lora_alpha=8))
    before, after = run(adapted, options, held_out, train)
    save(adapted, options, "adapter")
    return exit_status(before, after)


if __name__ == "__main__":
    sys.exit(main())
