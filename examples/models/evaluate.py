"""Measure every shipped model on held-out text, draw the plots, write results.json, and fail if a promise is broken.

python evaluate.py --work DIR      # needs DIR/tokens and DIR/texts.json; exit status 1 when a check fails
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import plots
import torch
from peft import PeftModel
from perplexity import held_out_windows, perplexity, unigram_perplexity
from router_statistics import RouterStatistics, router_statistics
from sources import DOMAINS
from torch import Tensor, nn
from training import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
UNIGRAM_RATIO = 0.1
"""`tiny-moe` must be ten times better than token frequencies: far from what a broken model reaches by accident."""
LEAST_LOAD = 0.25
ABSOLUTE_PATH = re.compile(r'"(/|[A-Z]:\\\\|file:)')
PROMPTS = {
    "prose": "DESCRIPTION\nThe",
    "python": "class Reader:\n    def __init__(self, path):\n",
    "c": "#ifndef _LINUX_QUEUE_H\n#define _LINUX_QUEUE_H\n\nstruct",
}


def load(name: str) -> nn.Module:
    """A shipped model in fp32 with stock code; refuses missing or unexpected keys."""
    model, info = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(map(str, keys)) for key, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{name} does not load cleanly: {wrong}")
    return model.eval()


def perplexities(model: nn.Module, windows: dict[str, Tensor]) -> dict[str, float]:
    return {domain: round(perplexity(model, rows), 2) for domain, rows in windows.items()}


def samples(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """One continuation per domain at the shipped generation defaults, seed 0."""
    texts = {}
    for domain, prompt in PROMPTS.items():
        torch.manual_seed(0)
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=120)
        texts[domain] = tokenizer.decode(ids[0], skip_special_tokens=True)
    return texts


def all_round_trip(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> bool:
    odd = "tab\there  é漢🎉 \x00\r\n\n\n don't , . !  end  "
    return all(tokenizer.decode(tokenizer.encode(text, verbose=False)) == text for text in [*texts, odd])


def checks(table: dict[str, dict[str, float]], router: RouterStatistics, *, round_trips: bool) -> dict[str, bool]:
    """Every promise of the README as a claim and whether it holds."""
    index = json.loads((HERE / "tiny-moe" / "model.safetensors.index.json").read_text())["weight_map"]
    saved = [path.read_text() for path in HERE.glob("tiny-*/*.json") if path.name != "tokenizer.json"]
    found = {
        "tokenizer round-trips every held-out text": round_trips,
        "tiny-moe has 3 or more shards": len(set(index.values())) >= 3,
        "tiny-moe stores experts one by one": "model.layers.0.mlp.experts.0.gate_proj.weight" in index,
        "no absolute path in a saved JSON": not any(ABSOLUTE_PATH.search(text) for text in saved),
        f"every expert has at least {LEAST_LOAD} of uniform load": router.least_load >= LEAST_LOAD,
    }
    specialists = {domain: table[f"tiny-dense-{domain}"] for domain in DOMAINS}
    for domain in DOMAINS:
        ratio = table["tiny-moe"][domain] / table["unigram"][domain]
        found[f"tiny-moe beats unigram on {domain} by 10 times or more"] = ratio <= UNIGRAM_RATIO
        own = specialists[domain][domain]
        found[f"the {domain} specialist beats the base on {domain}"] = own < table["tiny-dense"][domain]
        found[f"the {domain} specialist is the best of three on {domain}"] = (
            own == min(row[domain] for row in specialists.values())
            and [row[domain] for row in specialists.values()].count(own) == 1
        )
    return found


def facts_of_training() -> dict[str, dict[str, float]]:
    files = sorted(HERE.glob("*-training.json"))
    return {path.stem.removesuffix("-training"): json.loads(path.read_text()) for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder of corpus.py and train_tokenizer.py")
    parser.add_argument("--windows", type=int, default=80, help="most 512-token windows per domain")
    arguments = parser.parse_args()
    work = arguments.work
    windows = {domain: held_out_windows(work, domain, most=arguments.windows) for domain in DOMAINS}
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-moe")
    texts = json.loads((work / "texts.json").read_text())

    every = np.concatenate([token_ids(work, domain, "train") for domain in DOMAINS])
    table = {
        "unigram, all domains": {d: round(unigram_perplexity(every, windows[d]), 2) for d in DOMAINS},
        "unigram": {d: round(unigram_perplexity(token_ids(work, d, "train"), windows[d]), 2) for d in DOMAINS},
    }
    moe, dense = load("tiny-moe"), load("tiny-dense")
    table["tiny-moe"] = perplexities(moe, windows)
    table["tiny-dense"] = perplexities(dense, windows)
    for domain in DOMAINS:
        specialist = PeftModel.from_pretrained(load("tiny-dense"), HERE / f"tiny-dense-{domain}").eval()
        table[f"tiny-dense-{domain}"] = perplexities(specialist, windows)
    router = router_statistics(moe, windows)
    round_trips = all_round_trip(tokenizer, [text for domain in DOMAINS for text in texts[domain]["held_out"]])
    found = checks(table, router, round_trips=round_trips)

    results = {
        "held_out_tokens": {domain: rows[:, 1:].numel() for domain, rows in windows.items()},
        "perplexity": table,
        "router": {
            "least_load": round(router.least_load, 3),
            "most_load": round(router.most_load, 3),
            "mean_strongest_domain_share": round(router.mean_strongest_share, 3),
            "load": [[round(x, 3) for x in row] for row in router.load.tolist()],
            "domain_share": [[[round(x, 3) for x in e] for e in row] for row in router.domain_share.tolist()],
        },
        "parameters": {"tiny-moe": moe.num_parameters(), "tiny-dense": dense.num_parameters()},
        "training": facts_of_training(),
        "samples": {"tiny-moe": samples(moe, tokenizer), "tiny-dense": samples(dense, tokenizer)},
        "checks": found,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plots.main()
    plots.draw_router_load(router.load)
    plots.draw_router_domains(router.domain_share)

    print(f"{'perplexity':22s}" + "".join(f"{domain:>10s}" for domain in DOMAINS))
    for name, row in table.items():
        print(f"{name:22s}" + "".join(f"{row[domain]:10.2f}" for domain in DOMAINS))
    print(f"router load: least {router.least_load:.2f}, most {router.most_load:.2f} of uniform")
    for claim, holds in found.items():
        print("ok    " if holds else "FAILED", claim)
    sys.exit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
