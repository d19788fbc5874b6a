"""Teach the routers of an offloaded mixture of experts a new domain.

    python examples/finetune_router.py --steps 60

Nothing but the routers is trained: one matrix a layer. Writes the whole model, experts included, as a plain checkpoint.
"""

import sys

from finetuning import exit_status, load, parse, run, save

from transformers_moe_offload import training


def main() -> int:
    options = parse(__doc__, learning_rate=3e-3, output="finetuned-router", kind="model")
    model, held_out, train = load(options)
    training.set_trainable(model, "router")
    before, after = run(model, options, held_out, train)
    save(model, options, "model")
    return exit_status(before, after)


if __name__ == "__main__":
    sys.exit(main())
