"""Trainer trains offloaded models as it trains any: logs, checkpoints, goes on, finds the best."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_moe_offload import CheckpointError, ConfigError, HqqFormat, OffloadConfig, training


class Texts(Dataset):
    """Twelve sequences that are easy to learn: the next token is the same distance away."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = (torch.arange(10) * (1 + index % 3) + index) % 90
        return {"input_ids": ids, "labels": ids}


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(cache_budget="50%", **options))


def trainer(model, folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**defaults | options)
    callbacks = [training.MoeOffloadCallback()] if hasattr(model, "moe_offload") else []
    return Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=callbacks)


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def with_routers(model):
    training.set_trainable(model, "router")
    return model


def with_experts(model):
    training.unfreeze_experts(with_routers(model), {0: [1, 2]})
    return model


def with_lora(model):
    return get_peft_model(model, training.lora_config(model, r=2, routers=True))


METHODS = {"router": with_routers, "experts": with_experts, "lora": with_lora}


@pytest.mark.parametrize("method", METHODS)
def test_training_that_goes_on_from_a_checkpoint_has_the_losses_of_training_without_a_break(
    method, checkpoint, tmp_path
):
    torch.manual_seed(0)
    whole = trainer(METHODS[method](loaded(checkpoint)), tmp_path / "whole")
    whole.train()
    torch.manual_seed(0)
    again = trainer(METHODS[method](loaded(checkpoint)), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again)[3:] == losses(whole)[3:]
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.mark.parametrize("method", ["router", "lora"])
def test_the_losses_are_those_of_the_plain_model(method, checkpoint, tmp_path):
    curves = []
    for model in (
        AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager"),
        loaded(checkpoint),
    ):
        torch.manual_seed(0)
        run = trainer(METHODS[method](model), tmp_path / type(model).__name__, save_strategy="no")
        run.train()
        curves.append(losses(run))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-3)


def test_bfloat16_checkpointing_accumulation_and_the_best_model(checkpoint, tmp_path):
    model = get_peft_model(loaded(checkpoint), training.lora_config(loaded(checkpoint), r=2))
    run = trainer(
        model,
        tmp_path,
        bf16=True,
        activation_checkpointing=True,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    evaluated = run.evaluate()["eval_loss"]
    assert abs(evaluated - run.state.best_metric) < 1e-3
    read = PeftModel.from_pretrained(loaded(checkpoint), best)
    assert abs(trainer(read, tmp_path / "read", bf16=True).evaluate()["eval_loss"] - evaluated) < 1e-3


def test_the_callback_logs_the_cache_and_the_routers_beside_the_loss(checkpoint, tmp_path):
    run = trainer(METHODS["router"](loaded(checkpoint, mmap=False)), tmp_path, save_strategy="no")
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert all(0 < entry["moe_hit_rate"] < 1 for entry in entries)
    assert all(entry["moe_disk_mb_per_step"] > 0 for entry in entries)
    assert all(0 < entry["router_entropy"] <= torch.tensor(8.0).log() for entry in entries)


def test_going_on_with_another_model_than_the_one_that_was_trained_is_refused(checkpoint, tmp_path):
    from zoo.build import build

    run = trainer(METHODS["lora"](loaded(checkpoint)), tmp_path / "run")
    run.train()
    build("qwen3_moe", seed=1).save_pretrained(tmp_path / "other")
    other = trainer(METHODS["lora"](loaded(tmp_path / "other")), tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="resume_from_checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def with_adapter_of_routers(model):
    return get_peft_model(model, training.lora_config(model, r=2, experts=False, routers=True))


@pytest.mark.parametrize(
    ("method", "save", "warned"),
    [(with_routers, "steps", True), (with_routers, "no", False), (with_adapter_of_routers, "steps", False)],
)
def test_checkpoints_in_low_bits_that_trainer_does_not_go_on_from_are_warned_of(
    method, save, warned, checkpoint, tmp_path, caplog
):
    low_bits = {"experts": HqqFormat(nbits=4, group_size=16)}
    run = trainer(method(loaded(checkpoint, **low_bits)), tmp_path / "run", save_strategy=save)
    with caplog.at_level("WARNING", logger="transformers_moe_offload"):
        run.train()
    assert any("Trainer will neither go on" in record.message for record in caplog.records) == warned
    if save == "no":
        return
    again = trainer(method(loaded(checkpoint, **low_bits)), tmp_path / "again")
    folder = str(tmp_path / "run" / "checkpoint-3")
    if warned:
        with pytest.raises(ValueError, match="valid checkpoint"):
            again.train(resume_from_checkpoint=folder)
    else:
        again.train(resume_from_checkpoint=folder)
        assert losses(again)[3:] == losses(run)[3:]


def test_generation_in_the_middle_of_training_and_an_exception_in_a_step_do_no_harm(checkpoint, token_ids):
    model = loaded(checkpoint, mmap=False).train()
    training.set_trainable(model, "router")
    loss = model(input_ids=token_ids, labels=token_ids).loss
    model.eval()
    model.generate(input_ids=token_ids, max_new_tokens=3, num_beams=2, do_sample=False)
    model.train()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def fail(grad):
        raise RuntimeError("in the middle of a step")

    loss = model(input_ids=token_ids, labels=token_ids).loss
    handle = model.model.layers[1].mlp.gate.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="middle"):
        loss.backward()
    handle.remove()
    model.zero_grad()
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    assert expected
    for name, grad in expected.items():
        assert torch.equal(model.get_parameter(name).grad, grad)


def test_training_again_after_an_exception_watches_each_router_once(checkpoint, tmp_path):
    model = with_routers(loaded(checkpoint))
    first = trainer(model, tmp_path)

    def fail(*_):
        raise RuntimeError("in a step")

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in a step"):
        first.train()
    hook.remove()
    first.train()
    routers = [layer.mlp.gate for layer in model.model.layers]
    assert [len(router._forward_hooks) for router in routers] == [0] * len(routers)


def test_a_merged_checkpoint_is_the_model_with_its_adapter(checkpoint, token_ids, tmp_path):
    model = METHODS["lora"](loaded(checkpoint))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        training.save_merged(model, tmp_path)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(merged(input_ids=token_ids).logits, expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(input_ids=token_ids).logits, expected)


def test_router_losses_are_added_while_training_and_nothing_is_left_of_them(checkpoint, token_ids):
    model = loaded(checkpoint).train()
    plain = model(input_ids=token_ids, labels=token_ids).loss.item()
    extra = training.RouterRegulariser(model, balance=0.5, z=0.1)
    loss = model(input_ids=token_ids, labels=token_ids).loss
    assert loss.item() == pytest.approx(plain + 0.5 * extra.last["balance"] + 0.1 * extra.last["z"], rel=1e-5)
    assert extra.last["balance"] >= 0.9
    loss.backward()
    model.eval()
    assert model(input_ids=token_ids, labels=token_ids).loss.item() == pytest.approx(plain, rel=1e-5)
    extra.remove()
    noisy = training.RouterRegulariser(model.train(), jitter=0.3, dropout=0.2)
    assert model(input_ids=token_ids, labels=token_ids).loss.item() != plain
    noisy.remove()
    assert model(input_ids=token_ids, labels=token_ids).loss.item() == plain


def test_router_losses_come_along_with_a_copy_of_the_model(checkpoint, token_ids):
    model = loaded(checkpoint).train()
    extra = training.RouterRegulariser(model, balance=0.5)
    twin = copy.deepcopy(model)
    inputs = {"input_ids": token_ids, "labels": token_ids}
    regular = model(**inputs).loss.item()
    assert twin(**inputs).loss.item() == regular
    extra.remove()
    assert model(**inputs).loss.item() < regular
    assert twin(**inputs).loss.item() == regular


def test_router_losses_have_the_same_gradients_with_gradient_checkpointing(checkpoint, token_ids):
    model = with_routers(loaded(checkpoint)).train()
    training.RouterRegulariser(model, balance=0.5)
    gradients = []
    for _ in range(2):
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append(model.model.layers[1].mlp.gate.weight.grad.clone())
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", ["left", "right"])
def test_router_losses_do_not_count_padding(side, checkpoint, token_ids):
    model = loaded(checkpoint).train()
    extra = training.RouterRegulariser(model, balance=0.5, z=0.1)
    model(input_ids=token_ids, labels=token_ids)
    alone = extra.last
    padding, real = torch.zeros(2, 6, dtype=torch.long), torch.ones_like(token_ids)
    padded = (lambda pad, x: torch.cat([pad, x], 1)) if side == "left" else (lambda pad, x: torch.cat([x, pad], 1))
    positions = padded(padding, torch.arange(9).expand(2, -1))
    model(
        input_ids=padded(padding, token_ids),
        attention_mask=padded(padding, real),
        position_ids=positions,
        labels=padded(padding - 100, token_ids),
    )
    assert extra.last == pytest.approx(alone, rel=1e-4)


def test_a_batch_of_nothing_but_padding_adds_no_router_loss(checkpoint, token_ids):
    model = loaded(checkpoint).train()
    inputs = {"input_ids": token_ids, "labels": token_ids, "attention_mask": torch.zeros_like(token_ids)}
    expected = model(**inputs).loss.item()
    training.RouterRegulariser(model, balance=0.5)
    assert model(**inputs).loss.item() == expected


@pytest.mark.parametrize("steps", [1, 4])
def test_router_losses_weigh_as_much_however_many_forwards_make_a_step(steps, checkpoint, token_ids, tmp_path):
    model = with_routers(loaded(checkpoint)).train()
    texts = [{"input_ids": ids, "labels": ids} for ids in token_ids.repeat(2, 1)]
    args = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4 // steps,
        gradient_accumulation_steps=steps,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=texts)
    with torch.no_grad():
        plain = model(input_ids=token_ids, labels=token_ids).loss.item()
    extra = training.RouterRegulariser(model, z=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain + extra.last["z"], rel=0.05)


def test_a_forward_that_fails_leaves_nothing_of_router_losses_behind(checkpoint, token_ids):
    model = with_routers(loaded(checkpoint)).train()
    training.RouterRegulariser(model, balance=0.5)
    expected = model(input_ids=token_ids, labels=token_ids).loss.item()
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=token_ids, labels=token_ids[:1, :4])
    assert copy.deepcopy(model)(input_ids=token_ids, labels=token_ids).loss.item() == expected


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_forward_that_router_losses_would_have_no_effect_on_is_refused(is_reentrant, checkpoint, token_ids):
    model = with_routers(loaded(checkpoint)).train()
    training.RouterRegulariser(model, balance=0.5)
    with torch.no_grad():
        model(input_ids=token_ids)  # nothing is trained by it
    with pytest.raises(ConfigError, match="a tuple without one"):
        model(input_ids=token_ids, labels=token_ids, return_dict=False)
    if is_reentrant:
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    else:
        model.requires_grad_(False).lm_head.requires_grad_(True)
    with pytest.raises(ConfigError, match="no gradient, so balance, z and locality would change nothing"):
        model(input_ids=token_ids, labels=token_ids)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"balance": -1.0}, "balance=-1.0 is not the weight of a loss; choose 0 .off. or more"),
        ({"z": float("nan")}, "z=nan is not the weight of a loss"),
        ({"jitter": 1.0}, "jitter=1.0 is not a share; choose 0 .off. or more, but less than 1"),
        ({"dropout": -0.5}, "dropout=-0.5 is not a share"),
    ],
)
def test_a_router_loss_or_noise_out_of_bounds_is_refused_before_the_model_is_touched(option, message):
    with pytest.raises(ConfigError, match=message):
        training.RouterRegulariser(None, **option)
