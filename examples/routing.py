"""Study the routing of a small trained MoE, whose experts stay on disk: a few minutes on a laptop.

Records what the routers decide on text of two domains, swaps their strategy and compares the loss, asks how much of the
model's uncertainty comes from the choice of experts, and whether routers are right to be sure.

    python examples/routing.py [--output FOLDER]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload import OffloadConfig, routing
from transformers_moe_offload.routing.calibration import token_losses

HERE = Path(__file__).parent
DOMAINS = ("prose", "python")
LENGTH = 128

STRATEGIES = (
    ("top_k", {}),
    ("top_k", {"k": 1}),
    ("top_p", {"p": 0.6}),
    ("temperature", {"temperature": 1.0}),
    ("expert_choice", {}),
    ("hash", {}),
    ("random", {}),
)


def windows(tokenizer, domain: str, count: int) -> torch.Tensor:
    """(B, S) int64: the first windows of the texts of `examples/evaluation`."""
    lines = (HERE / "evaluation" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "models" / "tiny-moe"))
    parser.add_argument(
        "--output", type=Path, default=Path("routing-trace"), help="for the recording; replaces an older one"
    )
    parser.add_argument("--windows", type=int, default=4, help=f"of {LENGTH} tokens, from each domain")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, moe_offload=OffloadConfig(cache_budget="50%")).eval()
    texts = {domain: windows(tokenizer, domain, arguments.windows) for domain in DOMAINS}

    with routing.record_routing(model, arguments.output, overwrite=True) as recorder:
        for domain, ids in texts.items():
            recorder.domain = domain
            with torch.no_grad():
                model(input_ids=ids)
    trace = recorder.trace
    print(trace)
    for row in trace.summary():
        print(f"  router {row['router']}: entropy {row['entropy']:.2f} bits, repeats {100 * row['repeat_rate']:.0f}%")
    print(f"a page with plots: moe-offload report {arguments.output} -o report.html\n")

    print("loss in nats a token, by strategy")
    for name, options in STRATEGIES:
        with routing.set_routing(model, name, **options):
            losses = [f"{domain} {token_losses(model, ids).mean():.3f}" for domain, ids in texts.items()]
        print(f"  {name} {options or ''}: {', '.join(losses)}")

    found = routing.routing_uncertainty(model, texts["python"], "temperature", repeats=4)
    share = (found.mutual_information.sum() / found.entropy.sum()).item()
    print(f"\n{100 * share:.1f}% of the uncertainty about the next token comes from the choice of experts")

    print("does a router that is sure lose more when others choose? (rank correlation)")
    for one in routing.calibration(model, [texts["python"]], "random"):
        print(f"  router {one.router}: {one.correlation:+.2f}")


if __name__ == "__main__":
    sys.exit(main())
