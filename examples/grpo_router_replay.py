"""Train an adapter with TRL's GRPO, with the experts of its own rollouts and without, and compare.

    pip install trl
    python examples/grpo_router_replay.py

Prints how many routes differ between a rollout and the training on it, and how far the probabilities of its tokens are
apart. Exit status 1 if a route differs although it is replayed.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from transformers_moe_offload import OffloadConfig, routing, training

TINY_MOE = Path(__file__).parent / "models" / "tiny-moe"
PROMPTS = ["def read(path):", "The committee met on", "int main("]


class WatchedTrainer(GRPOTrainer):
    """Keeps the routes and the log-probabilities of each step's tokens; nothing else differs from GRPOTrainer."""

    def _compute_loss(self, model, inputs):
        with routing.record_routing(self.model, scores=None) as recorder:
            loss = super()._compute_loss(model, inputs)
        self.steps[-1]["trace"] = recorder.trace
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        self.steps.append({"texts": input_ids.tolist(), "chances": found[0].detach().float()})
        return found


class Rollouts:
    """Keeps what `generate` writes: routes, and the log-probability of each sampled token."""

    def __init__(self, model, *, is_replayed: bool) -> None:
        self.steps = []
        self._replay = routing.RolloutReplay(model)
        self._base = model.get_base_model()
        self._is_replayed = is_replayed

    def __enter__(self):
        self._replay.start()
        self._generate = self._base.generate
        self._base.generate = self._watched
        return self

    def __exit__(self, *_):
        self._replay.stop()

    def _watched(self, *args, generation_config, **kwargs):
        generation_config.update(output_logits=True, return_dict_in_generate=True)
        written = self._generate(*args, generation_config=generation_config, **kwargs)
        logits = torch.stack(written.logits, 1).float()
        sampled = written.sequences[:, -logits.shape[1] :]
        chances = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
        self.steps.append({"trace": self._replay.trace, "texts": written.sequences.tolist(), "chances": chances})
        if not self._is_replayed:
            routing.reset(self._base)
        return written.sequences


def train(steps: int, *, is_replayed: bool) -> tuple[int, int, float]:
    """Tokens and layers with other experts in training than in the rollout, all of them, and the divergence."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="50%"))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TRL's calls of Transformers
        arguments = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=6,
            num_generations=3,
            max_completion_length=24,
            generation_kwargs={"temperature": 1.0, "top_p": 1.0, "min_new_tokens": 24},
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        )
        trainer = WatchedTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS] * 2 * steps),
            processing_class=AutoTokenizer.from_pretrained(TINY_MOE),
            peft_config=training.lora_config(model, r=2, routers=True),
        )
        trainer.steps = []
        with Rollouts(trainer.model, is_replayed=is_replayed) as rollouts:
            trainer.train()
    differing, routes = 0, 0
    for rollout, step in zip(rollouts.steps, trainer.steps, strict=True):
        apart, of = routes_apart(rollout["trace"], step["trace"])
        differing, routes = differing + apart, routes + of
    return differing, routes, divergence(rollouts.steps[0], trainer.steps[0])


def routes_apart(rollout: routing.RoutingTrace, step: routing.RoutingTrace) -> tuple[int, int]:
    """Tokens and layers with different experts, and all that were compared: those that the rollout has read."""
    known = {tuple(rollout.token_ids(text).tolist()): rollout.routed_experts(text) for text in rollout.texts}
    differing = routes = 0
    for text in step.texts:
        own = known[tuple(step.token_ids(text).tolist()[:-1])]
        pair = [torch.from_numpy(one).sort(-1).values for one in (own, step.routed_experts(text)[:-1])]
        differing += int((pair[0] != pair[1]).any(-1).sum())
        routes += own.shape[0] * own.shape[1]
    return differing, routes


def divergence(rollout: dict, step: dict) -> float:
    """Mean of r - 1 - log r, r a sampled token's probability in training over that in the rollout (Schulman's k3)."""
    order = [rollout["texts"].index(text) for text in step["texts"]]  # TRL shuffles texts
    ratio = step["chances"] - rollout["chances"][order]
    return (ratio.exp() - 1 - ratio).mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args().steps
    for name, is_replayed in (("without replay", False), ("with replay", True)):
        differing, routes, nats = train(steps, is_replayed=is_replayed)
        print(f"{name}: {differing} of {routes:,} routes differ, divergence {nats:.6f} nats a token")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
