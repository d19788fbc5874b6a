"""Routers that are rewarded for choosing what they have chosen lately."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_moe_offload import ConfigError, OffloadConfig, routing, training
from transformers_moe_offload.training.locality import follows_in, locality_loss
from zoo.build import build

ALL = torch.tensor([[False, True, True, True]])


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def loss(rows, follows=ALL, top_k=1, window=1):
    return locality_loss(rows, top_k, follows, window).item()


def test_a_router_that_is_sure_of_the_same_expert_loses_nothing_and_one_that_never_repeats_loses_all():
    assert loss(logits(*[[9, 0, 0]] * 4)) == pytest.approx(0, abs=0.02)
    assert loss(logits([9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0])) == pytest.approx(1, abs=0.02)


def test_experts_next_to_the_edge_of_being_chosen_count_in_part_and_get_the_gradient():
    """The first token chooses expert 0, the second expert 1, which is just ahead of 0; the third is far behind."""
    rows = logits([9, 0, 0], [4.9, 5.1, 0]).requires_grad_()
    apart = locality_loss(rows, 1, torch.tensor([[False, True]]), 1)
    assert 0.5 < apart.item() < 0.6
    apart.backward()
    recent, chosen, other = (-rows.grad[1]).tolist()
    assert recent > 0 > chosen
    assert abs(other) < 1e-3 * abs(chosen)
    assert not rows.grad[0].any(), "the choice before is taken as it is"


def test_a_longer_window_remembers_more():
    rows = logits([9, 0, 0], [0, 9, 0], [9, 0, 0], [0, 9, 0])
    assert loss(rows) == pytest.approx(1, abs=0.02)
    # The second token has only the first before it; the others lack one of the two experts that were chosen lately.
    assert loss(rows, window=2) == pytest.approx((1 + 2 / 3 * 0.5 + 2 / 3 * 0.5) / 3, abs=0.02)
    assert loss(rows, window=9) == loss(rows, window=2)


def test_texts_of_a_batch_padding_and_packed_rows_are_kept_apart():
    same, other = [9, 0, 0], [0, 9, 0]
    rows = logits(same, same, other, other)
    assert loss(rows, torch.tensor([[False, True], [False, True]])) == pytest.approx(0, abs=0.02)
    assert loss(rows, torch.tensor([[False, True, False, True]]), window=4) == pytest.approx(0, abs=0.02)
    assert loss(rows, ALL) == pytest.approx(1 / 3, abs=0.02)
    assert loss(logits(same), torch.tensor([[False]])) == 0


def test_what_follows_what_is_told_by_mask_and_positions():
    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert follows_in(8, {"input_ids": ids}, ()).tolist() == [[False, True, True, True]] * 2
    padded = follows_in(8, {"input_ids": ids, "attention_mask": mask}, ())
    assert padded.tolist() == [[False, False, True, True], [False, True, False, False]]
    packed = follows_in(8, {"position_ids": torch.tensor([[0, 1, 0, 1]])}, (ids,))
    assert packed.tolist() == [[False, True, False, True]] * 2
    with pytest.raises(ConfigError, match=r"a router was given 7 rows and the model input_ids of shape \(2, 4\)"):
        follows_in(7, {"input_ids": ids}, ())


def test_locality_is_added_to_the_loss_with_its_weight(checkpoint, token_ids):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(cache_budget="50%")).train()
    plain = model(input_ids=token_ids, labels=token_ids).loss.item()
    extra = training.RouterRegulariser(model, locality=0.5, balance=0.1)
    together = model(input_ids=token_ids, labels=token_ids).loss
    expected = plain + 0.5 * extra.last["locality"] + 0.1 * extra.last["balance"]
    assert together.item() == pytest.approx(expected, rel=1e-5)
    assert 0 < extra.last["locality"] < 1
    together.backward()
    extra.remove()
    assert model(input_ids=token_ids, labels=token_ids).loss.item() == plain


def test_padding_and_checkpointing_change_nothing(checkpoint, token_ids):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    training.set_trainable(model, "router")
    extra = training.RouterRegulariser(model, locality=1.0, locality_window=3)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    alone = extra.last["locality"]
    padding, real = torch.zeros(2, 6, dtype=torch.long), torch.ones_like(token_ids)
    model(
        input_ids=torch.cat([padding, token_ids], 1),
        attention_mask=torch.cat([padding, real], 1),
        position_ids=torch.cat([padding, torch.arange(9).expand(2, -1)], 1),
        labels=torch.cat([padding - 100, token_ids], 1),
    )
    assert extra.last["locality"] == pytest.approx(alone, rel=1e-4)


def test_trained_by_trainer_routers_repeat_themselves_more(checkpoint, tmp_path):
    texts = torch.randint(1, 90, (12, 24), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "labels": ids} for ids in texts]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=6, learning_rate=2e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    rates = {}
    for locality in (0.0, 2.0):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(cache_budget="50%"))
        training.set_trainable(model, "router")
        extra = training.RouterRegulariser(model, locality=locality)
        Trainer(model, arguments, train_dataset=data).train()
        extra.remove()
        with routing.record_routing(model, scores=None) as recorder, torch.no_grad():
            model(texts)
        rates[locality] = sum(recorder.trace.statistics(router).repeat_rate for router in range(4)) / 4
    assert rates[2.0] > rates[0.0] + 0.1


def test_locality_comes_along_with_a_copy(checkpoint, token_ids):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    training.RouterRegulariser(model, locality=0.5)
    inputs = {"input_ids": token_ids, "labels": token_ids}
    assert copy.deepcopy(model)(**inputs).loss.item() == model(**inputs).loss.item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"locality": -1.0}, "locality=-1.0 is not the weight of a loss"),
        ({"locality": float("nan")}, "locality=nan is not the weight"),
        ({"locality": 1.0, "locality_window": 0}, "locality_window=0 is not a number of tokens; choose 1 or more"),
        ({"locality": 1.0, "locality_window": 1.5}, "locality_window=1.5 is not a number of tokens"),
    ],
)
def test_what_locality_cannot_be_is_refused_before_the_model_is_touched(options, message):
    with pytest.raises(ConfigError, match=message):
        training.RouterRegulariser(None, **options)


def test_a_model_that_reads_two_texts_is_refused():
    with pytest.raises(ConfigError, match="this model reads two; set it to 0"):
        training.RouterRegulariser(build("switch_transformers"), locality=1.0)
