"""Train in full the experts that a new domain uses most, and the routers, between frozen others.

    python examples/finetune_chosen_experts.py --steps 60

A recording of the routing of some training text says which experts those are. Writes the whole model as a plain
checkpoint.
"""

import sys

import torch
from finetuning import exit_status, load, parse, run, save

from transformers_moe_offload import routing, training


def main() -> int:
    options = parse(__doc__, learning_rate=1e-3, output="finetuned-experts", kind="model")
    model, held_out, train = load(options)
    with torch.no_grad(), routing.record_routing(model, scores=None) as recorder:
        model(input_ids=torch.stack([block["input_ids"] for block in train[:8]]))
    training.set_trainable(model, "router")
    names = training.unfreeze_experts(model, top=2, trace=recorder.trace)
    print(f"trained in full, among others: {names[0].rpartition('.')[0]}")
    before, after = run(model, options, held_out, train)
    save(model, options, "model")
    return exit_status(before, after)


if __name__ == "__main__":
    sys.exit(main())
