"""TRL's GRPO with the experts of its rollouts. Runs where trl is installed: `tox -e clients`, or `pip install trl`."""

from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from recorded import routes_apart  # noqa: E402
from transformers_moe_offload import OffloadConfig, routing, training  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, about Transformers

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
PROMPTS = ["def read(path):", "The committee met on", "int main("]


class Watched(trl.GRPOTrainer):
    """Records the forwards that losses are computed of, and keeps those losses' log-probabilities."""

    def _compute_loss(self, model, inputs):
        with routing.record_routing(self.model, scores=None) as recorder:
            loss = super()._compute_loss(model, inputs)
        self.trained.append(recorder.trace)
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        self.log_probabilities.append((input_ids, found[0].detach()))
        return found


def train(tmp_path, *, replays):
    """Two steps of GRPO: tokens and layers with other experts than in the rollout, and the divergence from it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="50%"))
    arguments = trl.GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=6, num_generations=3, max_completion_length=24,
        report_to=[], use_cpu=True, save_strategy="no", bf16=False, disable_tqdm=True, learning_rate=1e-4,
        gradient_checkpointing=True, generation_kwargs={"temperature": 1.0, "top_p": 1.0},
    )  # fmt: skip
    trainer = Watched(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(one))) for one in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS] * 4),
        processing_class=AutoTokenizer.from_pretrained(TINY_MOE),
        peft_config=training.lora_config(model, r=2, routers=True),
    )
    trainer.trained, trainer.log_probabilities = [], []
    rollouts, sampled = [], []
    replay = routing.RolloutReplay(trainer.model)
    with replay:
        generate = model.generate

        def watched(*args, **kwargs):
            written = generate(*args, **kwargs, output_logits=True, return_dict_in_generate=True)
            rollouts.append(replay.trace)
            sampled.append((written.sequences, torch.stack(written.logits, 1).float().log_softmax(-1)))
            if not replays:
                routing.reset(trainer.model)
            return written.sequences

        model.generate = watched
        trainer.train()
    apart = [routes_apart(*pair) for pair in zip(rollouts, trainer.trained, strict=True)]
    return apart, divergence(sampled[0], trainer.log_probabilities[0])


def divergence(sampled, trained):
    """Mean of r - 1 - log r over the sampled tokens of the first step, r their probability in training over that in the
    rollout (Schulman 2020, "Approximating KL divergence", k3). TRL shuffles the texts of a rollout."""
    (sequences, chances), (ids, log_probabilities) = sampled, trained
    length = chances.shape[1]
    own = chances.gather(-1, sequences[:, -length:, None])[..., 0]
    order = [next(row for row, text in enumerate(sequences.tolist()) if text == one) for one in ids.tolist()]
    ratio = log_probabilities.float() - own[order]
    return (ratio.exp() - 1 - ratio).mean().item()


def test_grpo_trains_on_the_routes_of_its_rollouts(tmp_path):
    own, own_divergence = train(tmp_path, replays=False)
    replayed, replayed_divergence = train(tmp_path, replays=True)
    assert sum(one.routes for one in own) > 0
    assert len(replayed) == 2
    assert all(one.tokens > 100 and one.routes == 0 for one in replayed)
    assert replayed_divergence < own_divergence
    print(f"{own} {own_divergence:.3g} without, {replayed} {replayed_divergence:.3g} with replay")
