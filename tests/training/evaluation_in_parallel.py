"""Evaluate an offloaded model in as many processes as started this, by what Accelerate prepares: MODEL OUTPUT."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig, cache_stats


@torch.no_grad()
def main(name: str, output: str) -> None:
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
        Path(output).write_text(json.dumps([type(prepared).__name__, gathered.tolist()]))
    accelerator.wait_for_everyone()
    # Without tearing anything down: a wrapper that outlives its process group waits for gloo's threads with the
    # interpreter's lock held, which they may need, and one that does not may abort the process.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
