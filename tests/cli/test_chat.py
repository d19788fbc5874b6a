"""`moe-offload chat` says what the model says, sums up what it cost, and says in one line what is wrong."""

import re
import signal

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transformers_moe_offload.cli.answer import Meter

from .conftest import the_error

SUMMARY = re.compile(r"\[(\d+) tokens, [\d.]+ tokens/s, first after [\d.]+ s, hit rate ([\d.]+)%, ([\d.]+) MiB read\]")

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and 'secret' in m.content %}{{ raise_exception('no secrets') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def continued(folder, prompt: str, num_tokens: int) -> str:
    """What plain Transformers makes of a prompt, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def greedy(run, model, *arguments, **options):
    return run(
        *("chat", model, "--cache-budget", "25%", "--arithmetic", "exact"),
        *("--temperature", 0, "--max-new-tokens", 12, *arguments),
        **options,
    )


def test_a_prompt_gets_the_answer_of_plain_transformers(run, tiny_moe):
    result = greedy(run, tiny_moe, "--prompt", "def main(")
    assert result.exit_code == 0, result.output
    assert result.stdout == continued(tiny_moe, "def main(", 12).rstrip("\n") + "\n"


def test_the_summary_counts_tokens_hits_and_bytes(run, tiny_moe):
    result = greedy(run, tiny_moe, "--prompt", "def main(")
    num_tokens, hit_rate, mib = SUMMARY.search(result.stderr).groups()
    assert int(num_tokens) == 12
    assert 0 < float(hit_rate) < 100
    assert float(mib) > 0


def test_each_line_of_stdin_is_a_prompt(run, tiny_moe):
    result = greedy(run, tiny_moe, input="def main(\n\n#include <\n")
    assert result.exit_code == 0, result.output
    expected = [continued(tiny_moe, prompt, 12).rstrip("\n") for prompt in ("def main(", "#include <")]
    assert result.stdout == "\n".join(expected) + "\n"
    assert len(SUMMARY.findall(result.stderr)) == 2


def test_the_seed_decides_what_is_sampled(run, tiny_moe):
    def sampled(seed):
        arguments = ("--prompt", "The", "--temperature", 1.5, "--top-p", 0.99, "--max-new-tokens", 12, "--seed", seed)
        return run("chat", tiny_moe, *arguments).stdout

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_chat_template_sees_the_system_message_and_what_was_said_before(run, linked, monkeypatch):
    folder = linked(tokenizer_config={"chat_template": TEMPLATE})
    put = []
    plain = AutoTokenizer.from_pretrained(folder).__class__.apply_chat_template

    def apply(self, messages, **options):
        put.append([(message["role"], message["content"]) for message in messages])
        return plain(self, messages, **options)

    monkeypatch.setattr(f"{plain.__module__}.{plain.__qualname__}", apply)
    result = greedy(run, folder, "--system", "Be terse.", input="one\ntwo\n")
    assert result.exit_code == 0, result.output
    assert put[0] == [("system", "Be terse."), ("user", "one")]
    assert put[1][:2] == put[0]
    assert put[1][2][0] == "assistant"
    assert result.stdout.startswith(put[1][2][1].rstrip("\n"))
    assert put[1][3] == ("user", "two")


def test_ctrl_c_ends_a_command_that_nobody_types_into_after_the_token_it_is_at(run, tiny_moe, monkeypatch):
    count_token = Meter.count_token

    def count_three_and_interrupt(meter):
        count_token(meter)
        if meter.num_tokens == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Meter, "count_token", count_three_and_interrupt)
    result = greedy(run, tiny_moe, input="def main(\n#include <\n")
    assert result.exit_code == 130
    (summary,) = SUMMARY.findall(result.stderr)
    assert int(summary[0]) in (3, 4)  # Transformers may look at the criterion before it streams the token


# Wrong input.


def test_a_template_that_refuses_is_quoted(run, linked):
    folder = linked(tokenizer_config={"chat_template": TEMPLATE})
    assert "refuses the conversation: no secrets" in the_error(
        greedy(run, folder, "--system", "secret", "--prompt", "x")
    )


def test_a_system_message_needs_a_template(run, tiny_moe):
    assert "--system needs a model with a chat template" in the_error(greedy(run, tiny_moe, "--system", "Be terse."))


def test_an_empty_prompt_is_refused(run, tiny_moe):
    assert "--prompt is empty" in the_error(greedy(run, tiny_moe, "--prompt", " "))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cache-budget", "lots", "'lots' is not a budget"),
        ("--cache-budget", "1KiB", "set --cache-budget to 110,592 bytes or more"),
        ("--policy", "clairvoyant", "--policy 'clairvoyant' is not a known policy; choose one of ['least_stale'"),
        ("--arithmetic", "sloppy", "--arithmetic 'sloppy' is not one of ['fast', 'exact', 'int8']"),
        ("--dtype", "bf16", "'bf16' is not 'auto'"),
        ("--device-map", "gpu0", "gpu0"),
    ],
)
def test_a_wrong_value_is_named(run, tiny_moe, option, value, message):
    assert message in the_error(run("chat", tiny_moe, "--prompt", "x", option, value))


@pytest.mark.parametrize(
    ("option", "value"), [("--max-new-tokens", 0), ("--temperature", -1), ("--top-p", 1.5), ("--seed", -1)]
)
def test_a_number_out_of_range_is_a_usage_error(run, tiny_moe, option, value):
    result = run("chat", tiny_moe, "--prompt", "x", option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Invalid value" in result.stderr


def test_an_unknown_model_is_refused(run):
    error = the_error(run("chat", "nobody/nothing-of-that-name", "--local-files-only", "--prompt", "x"))
    assert "there is no folder 'nobody/nothing-of-that-name' here" in error


def test_a_model_without_weights_is_refused(run, linked):
    folder = linked(without="*.safetensors*")
    assert "cannot load" in the_error(run("chat", folder, "--prompt", "x"))


def test_a_model_without_a_tokenizer_is_refused(run, linked):
    error = the_error(run("chat", linked(without="tokenizer*"), "--prompt", "x"))
    assert "the tokenizer makes no tokens of the prompt" in error


def test_a_model_without_experts_is_refused(run, dense_model):
    LlamaForCausalLM(LlamaConfig.from_pretrained(dense_model)).save_pretrained(dense_model)
    assert "LlamaForCausalLM has no routed experts" in the_error(run("chat", dense_model, "--prompt", "x"))
