"""Evaluate with several processes, each with its share of the texts and a cache of its own.

    accelerate launch --multi_gpu --num_processes 2 examples/evaluation/data_parallel.py

On several GPUs lm-evaluation-harness (0.4.13) does this by itself, launched the same way; on anything else each of its
processes goes over all texts. So here the model is made first, and the harness is told which share is whose. Despite
its name, `--multi_gpu` is what makes `accelerate launch` start several processes on a CPU, too.
"""

import argparse
import json
from pathlib import Path

import lm_eval
import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_moe_offload  # noqa: F401  importing installs

HERE = Path(__file__).parent


def evaluate(model: str, task: str, cache_budget: str, limit: int | None) -> None:
    """Print the figures of a task, from the first process."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    offloaded = AutoModelForCausalLM.from_pretrained(
        model, moe_offload={"cache_budget": cache_budget}, device_map={"": accelerator.device}
    )
    harness = HFLM(pretrained=offloaded, tokenizer=AutoTokenizer.from_pretrained(model))
    harness.accelerator = accelerator
    harness._rank, harness._world_size = accelerator.process_index, accelerator.num_processes
    found = lm_eval.simple_evaluate(
        harness, tasks=[task], task_manager=TaskManager(include_path=str(HERE)), limit=limit, bootstrap_iters=0
    )
    print(f"process {accelerator.process_index} of {accelerator.num_processes}: {offloaded.moe_offload.stats()}")
    if accelerator.is_main_process:
        print(json.dumps(found["results"][task], indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / "models" / "tiny-moe"))
    parser.add_argument("--task", default="moe_offload_prose")
    parser.add_argument("--cache-budget", default="50%")
    parser.add_argument("--limit", type=int, help="texts of the task; all where it is left out")
    options = parser.parse_args()
    evaluate(options.model, options.task, options.cache_budget, options.limit)
