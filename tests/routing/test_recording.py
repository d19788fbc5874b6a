"""What a recording holds, that it is what happened, and that nothing is lost on the way to disk and back."""

import copy
import json
from dataclasses import replace as replace_facts
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forked import in_a_child
from hurried import run_at_once
from transformers_moe_offload import (
    ConfigError,
    MoeOffloadError,
    OffloadConfig,
    UnsupportedModelError,
    cache_stats,
    routing,
)
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.routing import RoutingTrace, recorder, sites
from transformers_moe_offload.routing.sites import find_sites
from transformers_moe_offload.routing.switching import observe, stop_observing
from transformers_moe_offload.tracing import TraceError, replay
from zoo.build import build, failure_of_stock, inputs, zoo_names

NOTHING_TO_RECORD = {"nllb_moe"}
CHOSEN_BY_TABLE = {("deepseek_v4", 0), ("deepseek_v4", 1)}
"""Routers that look token ids up instead of comparing scores."""


def record(model, token_ids, path=None, **options):
    with routing.record_routing(model, path, **options) as recorder, torch.no_grad():
        model(input_ids=token_ids)
    return recorder.trace


def only(trace, router=0):
    (rows,) = trace.rows(router)
    return rows


@pytest.fixture
def trace(plain, token_ids):
    return record(plain, token_ids, scores="float32", hidden_states=True)


def test_a_recording_holds_what_each_router_was_given_and_decided(plain, token_ids, trace):
    decisions = {}

    def note(router, decision):
        decisions[router] = decision

    observe(plain, find_sites(plain), note)
    with torch.no_grad():
        plain(input_ids=token_ids)
    stop_observing(plain, note)
    assert [facts.path for facts in trace.routers] == [site.path for site in find_sites(plain)]
    for router, decision in decisions.items():
        rows = only(trace, router)
        assert np.array_equal(rows.scores, decision.scores)
        assert np.array_equal(rows.experts, decision.experts)
        assert np.array_equal(rows.weights, decision.weights)
        assert np.array_equal(rows.hidden, decision.hidden)
        assert np.array_equal(rows.token_ids, token_ids.flatten())
        assert rows.sequence.tolist() == [0] * 9 + [1] * 9
        assert rows.position.tolist() == [*range(9)] * 2
        assert trace.routers[router].has_affinities
    assert (trace.num_tokens, trace.num_steps) == (18, 1)


def test_recording_changes_no_bit_and_leaves_no_hook(plain, token_ids):
    with torch.no_grad():
        before = plain(input_ids=token_ids).logits
        with routing.record_routing(plain):
            assert torch.equal(plain(input_ids=token_ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_a_generation_is_one_text_for_each_row_of_its_batch(plain, token_ids):
    with routing.record_routing(plain) as recorder:
        for _ in range(2):
            plain.generate(token_ids, max_new_tokens=4, min_new_tokens=4)
    rows = only(recorder.trace)
    assert set(rows.sequence.tolist()) == {0, 1, 2, 3}
    for text in range(4):
        assert rows.position[rows.sequence == text].tolist() == [*range(12)]
    assert recorder.trace.num_steps == 8


def test_padding_is_routed_and_recorded_but_not_counted(plain, token_ids):
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(input_ids=token_ids, attention_mask=mask)
    assert len(only(recorder.trace).experts) == 14
    assert sum(len(rows.experts) for rows in recorder.trace.rows(0, padding=True)) == 18
    assert recorder.trace.statistics(0).num_tokens == 14


def counted_by_hand(rows, num_experts):
    """How many of the rows chose each expert with a weight that is not zero."""
    chosen = [
        expert
        for experts, weights in zip(rows.experts.tolist(), rows.weights.tolist(), strict=True)
        for expert, weight in zip(experts, weights, strict=True)
        if expert >= 0 and weight
    ]
    return [chosen.count(expert) for expert in range(num_experts)]


def test_tokens_are_counted_without_padding_by_the_paths_of_experts(plain, token_ids):
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(input_ids=token_ids, attention_mask=mask)
    trace = recorder.trace
    counts = trace.token_counts()
    assert [*counts] == [*trace.to_cache_trace().layer_names]
    for router, (facts, uses) in enumerate(zip(trace.routers, counts.values(), strict=True)):
        assert uses == counted_by_hand(only(trace, router), facts.num_experts)
        assert sum(uses) == 14 * facts.top_k


def test_the_hottest_of_a_recording_are_those_that_most_tokens_chose(plain, token_ids):
    trace = record(plain, token_ids)
    counts = {
        (layer, expert): count
        for layer, facts in enumerate(trace.routers)
        for expert, count in enumerate(counted_by_hand(only(trace, layer), facts.num_experts))
    }
    by_use = sorted(counts, key=lambda one: (-counts[one], one))[: round(len(counts) / 4)]
    assert counts[by_use[-1]] > 1, "more than whether an expert was chosen"
    expected = {}
    for layer, expert in sorted(by_use):
        expected.setdefault(str(layer), []).append(expert)
    assert trace.hottest("25%") == expected


def test_the_hottest_of_some_layers_have_the_numbers_of_the_model(plain, token_ids):
    trace = record(plain, token_ids, layers=[2])
    assert [*trace.hottest("50%")] == ["2"]


def test_experts_without_weights_and_choices_of_none_or_of_weight_zero_are_not_counted(plain, token_ids):
    trace = record(plain, token_ids)
    (part,) = trace.parts()
    part = {name: array.copy() for name, array in part.items()}
    part["experts.0"][:, 0], part["experts.0"][:, 1], part["weights.0"][:] = 1, -1, 0.5
    part["weights.0"][:3, 0] = 0
    part["experts.1"][:, 0], part["experts.1"][:, 1], part["weights.1"][:] = 2, 7, 0.5
    facts = list(trace.routers)
    facts[1] = replace_facts(facts[1], num_with_weights=7)
    edited = RoutingTrace(replace_facts(trace._index, routers=facts), [part])
    first, second, *_ = edited.token_counts().values()
    assert first == [0, 15, 0, 0, 0, 0, 0, 0]
    assert second == [0, 0, 18, 0, 0, 0, 0]


def test_a_router_of_several_layers_counts_for_each(plain, token_ids):
    trace = record(plain, token_ids)
    first, *others = trace.routers
    twice = replace_facts(first, layers=(0, 9), experts_paths=("a.experts", "b.experts"))
    edited = RoutingTrace(replace_facts(trace._index, routers=[twice, *others]), trace._source)
    counts = edited.token_counts()
    assert counts["a.experts"] == counts["b.experts"]
    assert [*counts][-1] == "b.experts"


def test_a_strategy_is_recorded_as_it_chose(plain, token_ids):
    with routing.set_routing(plain, "top_p", p=0.3):
        trace = record(plain, token_ids)
    rows = only(trace)
    chosen = rows.experts >= 0
    assert ((rows.weights != 0) == chosen).all()
    assert 1 <= chosen.sum(axis=1).min() < chosen.sum(axis=1).max()
    assert trace.statistics(0).load.sum() == chosen.sum()


def test_more_domains_or_experts_than_a_recording_can_number_are_refused(plain, token_ids, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_CHOICES", 8)
    with routing.record_routing(plain) as recording, torch.no_grad():
        for number in range(8):
            recording.domain = f"text {number}"
            plain(token_ids)
        recording.domain = "text 8"
        with pytest.raises(MoeOffloadError, match="domain='text 8' is one too many: a recording has at most 8"):
            plain(token_ids)
        recording.domain = "text 0"
        plain(token_ids)
    assert len(recording.trace.domains) == 8
    monkeypatch.setattr(sites, "MAX_CHOICES", 1)
    with pytest.raises(UnsupportedModelError, match=r"chooses among \d+ experts; a recording supports at most 1"):
        routing.record_routing(plain).__enter__()


@pytest.mark.parametrize("domain", [3, True, ["x"], b"x", "\ud800", torch.tensor(1)])
def test_a_domain_that_no_recording_can_hold_is_refused_when_it_is_set(plain, token_ids, tmp_path, domain):
    with routing.record_routing(plain, tmp_path) as recording, torch.no_grad():
        recording.domain = "code"
        with pytest.raises(ConfigError, match="is not text that can be written; pass a str, or None for no domain"):
            recording.domain = domain
        assert recording.domain == "code"
        plain(token_ids)
    assert RoutingTrace.load(tmp_path).domains == ("code",)


def test_a_recording_is_not_given_while_it_runs(plain, token_ids):
    with routing.record_routing(plain) as recording, torch.no_grad():
        plain(token_ids)
        with pytest.raises(TraceError, match="still running; read `trace` after the `with` block"):
            recording.trace  # noqa: B018
    assert recording.trace.num_steps == 1


def test_a_streamed_trace_is_the_one_in_memory_and_its_parts_are_small(plain, token_ids, tmp_path):
    with routing.record_routing(plain, tmp_path / "trace", buffer_size=4_000) as streamed:
        with routing.record_routing(plain) as kept:
            for domain in ("prose", "code"):
                streamed.domain = kept.domain = domain
                plain.generate(token_ids, max_new_tokens=20, min_new_tokens=20)
        assert len(streamed._buffer._rows) < 30, "the buffer keeps what was written"
    loaded = RoutingTrace.load(tmp_path / "trace")
    files = sorted((tmp_path / "trace").glob("part-*"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 20_000
    for router in range(len(loaded.routers)):
        whole = only(kept.trace, router)
        for name, expected in whole._asdict().items():
            if expected is not None:
                assert np.array_equal(np.concatenate([getattr(r, name) for r in loaded.rows(router)]), expected), name
        assert loaded.statistics(router).figures() == pytest.approx(kept.trace.statistics(router).figures())
        assert np.array_equal(loaded.statistics(router).next_token, kept.trace.statistics(router).next_token)
        assert loaded.statistics(router).reuse == kept.trace.statistics(router).reuse
    kept.trace.save(tmp_path / "again")
    assert RoutingTrace.load(tmp_path / "again").summary() == kept.trace.summary()


def test_what_was_written_before_an_accident_can_be_read(plain, token_ids, tmp_path):
    def go_wrong():
        with routing.record_routing(plain, tmp_path / "trace"), torch.no_grad():
            plain(input_ids=token_ids)
            raise RuntimeError("accident")

    with pytest.raises(RuntimeError, match="accident"):
        go_wrong()
    assert RoutingTrace.load(tmp_path / "trace").num_tokens == 18
    assert not any(module._forward_hooks for module in plain.modules())


def test_a_child_that_is_forked_meanwhile_computes_and_leaves_the_recording_alone(plain, token_ids, tmp_path):
    def compute_and_leave() -> bool:
        same = torch.equal(plain(token_ids).logits, expected)
        recorder.stop()
        return same

    with torch.no_grad():
        expected = plain(token_ids).logits
        with routing.record_routing(plain, tmp_path / "trace", buffer_size=1) as recorder:
            plain(token_ids)
            with recorder._writing:  # as if a thread of the parent's were writing just then
                assert in_a_child(compute_and_leave) is True
            plain(token_ids)
    assert RoutingTrace.load(tmp_path / "trace").num_tokens == 2 * token_ids.numel()


def test_a_forward_that_fails_is_not_recorded(plain, token_ids):
    def fail(*_):
        raise RuntimeError("accident")

    hook = plain.model.layers[2].register_forward_pre_hook(fail)
    with routing.record_routing(plain) as recorder, torch.no_grad():
        with pytest.raises(RuntimeError, match="accident"):
            plain(input_ids=token_ids)
        hook.remove()
        plain(input_ids=token_ids[:, :3])
    assert recorder.trace.num_tokens == 6


def test_gradient_checkpointing_records_each_token_once(plain, token_ids):
    plain.train().activation_checkpointing_enable()
    with routing.record_routing(plain) as recorder:
        plain(input_ids=token_ids, labels=token_ids).loss.backward()
    assert len(only(recorder.trace).experts) == 18


def test_a_copy_that_is_made_meanwhile_is_not_recorded(plain, token_ids):
    with routing.record_routing(plain) as recorder, torch.no_grad():
        twin = copy.deepcopy(plain)
        twin(input_ids=token_ids)
        plain(input_ids=token_ids[:, :2])
    assert recorder.trace.num_tokens == 4


@pytest.mark.parametrize("name", [name for name in zoo_names() if name not in NOTHING_TO_RECORD])
def test_every_architecture_can_be_recorded(name):
    if failure_of_stock(name) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(name)!r}")
    model = build(name)
    with routing.record_routing(model) as recorder, torch.no_grad():
        model(**inputs(name, model))
    for router, facts in enumerate(recorder.trace.routers):
        figures = recorder.trace.statistics(router).figures()
        assert figures["tokens"] > 0
        assert 0 <= figures["entropy"] <= np.log2(facts.num_experts)
        assert 0 < figures["confidence"] <= 1 + 1e-9
        if (name, router) not in CHOSEN_BY_TABLE:
            assert figures["margin"] > -1e-2, "experts were not chosen by the scores that were recorded"


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_recording_replays_to_the_statistics_of_the_cache(checkpoint, token_ids, policy):
    config = OffloadConfig(cache_budget="40%", policy=policy)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    with routing.record_routing(model) as recorder, model.moe_offload.trace() as visits:
        model.generate(token_ids, max_new_tokens=12, min_new_tokens=12)
    trace = recorder.trace.to_cache_trace()
    assert trace.visits == visits.visits
    assert trace.layer_names == visits.layer_names
    stats = cache_stats(model)
    played = replay(trace, policy, model.moe_offload.plan.pools[0].num_slots)
    assert {layer: one.hits for layer, one in played.per_layer.items()} == {
        layer: one.hits for layer, one in enumerate(stats.per_layer.values())
    }


def test_centroids_are_fitted_to_recorded_hidden_states(plain, token_ids, trace):
    centroids = routing.fit_centroids(trace)
    assert {tuple(one.shape) for one in centroids.values()} == {(8, plain.config.hidden_size)}
    with routing.set_routing(plain, "k_means", centroids=centroids):
        record(plain, token_ids)
    some = record(plain, token_ids, layers=[2], hidden_states=True)
    assert set(routing.fit_centroids(some)) == {2}
    with pytest.raises(ConfigError, match=r"fitted for routers \[2\], and not for router 0"):
        routing.set_routing(plain, "k_means", centroids=routing.fit_centroids(some))
    narrow = {router: one[:, :5] for router, one in centroids.items()}
    with (
        routing.set_routing(plain, "k_means", centroids=narrow),
        pytest.raises(ConfigError, match=r"centroids of router 0 are \(8, 5\), and its hidden states have \d+ values"),
    ):
        record(plain, token_ids)
    with pytest.raises(ConfigError, match="has no hidden states; record it with"):
        routing.fit_centroids(record(plain, token_ids))


def test_two_runs_agree_wholly_or_by_chance(plain, token_ids, trace):
    assert trace.agreement(record(plain, token_ids)) == [1.0] * 4
    with routing.set_routing(plain, "random"):
        by_chance = record(plain, token_ids)
    assert all(0.0 <= agreement < 0.5 for agreement in trace.agreement(by_chance))
    with pytest.raises(TraceError, match="18 and 2 tokens, but not the same tokens"):
        trace.agreement(record(plain, token_ids[:, :1]))


def test_a_table_has_a_row_for_each_token_and_router(plain, token_ids, trace):
    table = trace.to_pandas()
    assert len(table) == 18 * 4
    assert table.columns.tolist()[:4] == ["router", "token_id", "sequence", "position"]
    row = table.iloc[20]
    assert row.router == 1
    assert list(row.experts) == only(trace, 1).experts[2].tolist()
    assert row.entropy == pytest.approx(trace.statistics(1).entropy[2])


def test_scores_can_be_left_out_and_then_nothing_is_made_of_them(plain, token_ids):
    trace = record(plain, token_ids, scores=None)
    assert not any(name.startswith("scores.") for part in trace.parts() for name in part)
    assert np.isnan(trace.statistics(0).figures()["entropy"])
    with pytest.raises(TraceError, match="the trace has no scores"):
        trace.probabilities(only(trace), 0)
    assert "entropy" not in trace.to_arrow().column_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "int8"}, "scores='int8' is not one of"),
        ({"buffer_size": "10%"}, "buffer_size='10%' is not a number of bytes"),
        ({"layers": [7]}, "the model has routers 0 to 3"),
    ],
)
def test_an_option_that_cannot_be_is_refused(plain, options, message):
    with pytest.raises(ConfigError, match=message), routing.record_routing(plain, **options):
        pass


def test_a_folder_with_a_trace_is_not_overwritten(plain, token_ids, tmp_path):
    record(plain, token_ids, tmp_path)
    with pytest.raises(TraceError, match="has a routing trace already"), routing.record_routing(plain, tmp_path):
        pass
    with pytest.raises(TraceError, match="replace it with overwrite=True"):
        RoutingTrace.load(tmp_path).save(tmp_path)


def test_a_recording_is_replaced_where_that_is_asked_for_and_nothing_else_is(plain, token_ids, tmp_path):
    with routing.record_routing(plain, tmp_path, buffer_size=1), torch.no_grad():
        plain(token_ids)
        plain(token_ids)
    (tmp_path / "notes.txt").write_text("mine")
    assert len([*tmp_path.glob("part-*")]) == 2
    with routing.record_routing(plain, tmp_path, overwrite=True), torch.no_grad():
        plain(token_ids[:1])
    trace = RoutingTrace.load(tmp_path)
    assert trace.num_tokens == token_ids[:1].numel()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "part-00000.safetensors", "trace.json"]
    assert repr(trace) == f"RoutingTrace({trace})"
    with pytest.raises(TraceError, match="is where this trace is read from"):
        trace.save(tmp_path, overwrite=True)
    trace.save(tmp_path / "copy")
    trace.save(tmp_path / "copy", overwrite=True)
    assert RoutingTrace.load(tmp_path / "copy").num_tokens == trace.num_tokens


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "trace.json").unlink(), "cannot read the routing trace"),
        (lambda folder: (folder / "trace.json").write_text("[]"), "is not of format 1"),
        (lambda folder: (folder / "part-00000.safetensors").write_bytes(b"\0" * 9), "cannot read"),
        (lambda folder: edit(folder, "parts", ["../x"]), "is not the name of a part, such as part-00000"),
        (lambda folder: edit(folder, "parts", None), "parts=None is not valid"),
        (lambda folder: edit(folder, "parts", [1]), r"parts=\[1\] is not valid"),
        (lambda folder: edit(folder, "num_steps", "x"), "num_steps='x' is not valid"),
        (lambda folder: edit(folder, "routers", [{}]), "has the keys"),
        (lambda folder: edit(folder, "routers", []), "a call of router 3, but trace.json lists 0 routers"),
    ],
)
def test_a_damaged_trace_is_refused_with_the_reason(plain, token_ids, tmp_path, damage, message):
    record(plain, token_ids, tmp_path)
    damage(tmp_path)
    with pytest.raises(TraceError, match=message):
        RoutingTrace.load(tmp_path).summary() or [*RoutingTrace.load(tmp_path).parts()]


def test_a_recording_does_not_depend_on_the_working_directory(plain, token_ids, tmp_path, monkeypatch):
    expected = record(plain, token_ids).summary()
    for folder in ("here", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with routing.record_routing(plain, "trace"), torch.no_grad():
        monkeypatch.chdir(tmp_path / "elsewhere")
        plain(input_ids=token_ids)
    assert [*(tmp_path / "elsewhere").iterdir()] == []
    monkeypatch.chdir(tmp_path / "here")
    loaded = RoutingTrace.load("trace")
    monkeypatch.chdir(tmp_path / "elsewhere")
    record(plain, token_ids.flip(1), "trace")
    assert loaded.summary() == expected


def test_a_part_that_was_replaced_since_the_trace_was_loaded_is_refused(plain, token_ids, tmp_path):
    record(plain, token_ids, tmp_path / "one")
    record(plain, token_ids.flip(1), tmp_path / "other")
    loaded = RoutingTrace.load(tmp_path / "one")
    (tmp_path / "other" / "part-00000.safetensors").replace(tmp_path / "one" / "part-00000.safetensors")
    with pytest.raises(TraceError, match="has changed since the trace was loaded"):
        loaded.summary()


def edit(folder, key, value):
    index = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps(index | {key: value}))


def test_a_part_that_cannot_be_written_is_an_error_and_leaves_no_half(plain, token_ids, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(TraceError, match="No space left"):
        record(plain, token_ids, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_part_that_could_not_be_written_is_written_with_the_next_one(plain, token_ids, tmp_path, monkeypatch):
    replace, refusals = Path.replace, [OSError(28, "No space left")]

    def full_once(self, target):
        if refusals:
            raise refusals.pop()
        return replace(self, target)

    with routing.record_routing(plain, tmp_path, buffer_size=1) as recorder:
        monkeypatch.setattr(Path, "replace", full_once)
        with pytest.raises(TraceError, match="No space left"):
            plain(token_ids)
        plain(token_ids)
    trace = RoutingTrace.load(tmp_path)
    assert recorder.trace.num_tokens == trace.num_tokens == sum(len(part["token_ids"]) for part in trace.parts())
    assert trace.num_tokens == 2 * token_ids.numel()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx"])
def test_steps_that_are_read_without_watching_say_what_watching_says(name):
    model = build(name)
    ids = inputs(name, model)["input_ids"]
    watched = []

    def note(router, decision):
        watched.append((decision.scores.float().numpy().copy(), decision.experts.numpy(), decision.weights.numpy()))

    with routing.record_routing(model, scores="float32") as recorder:
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with routing.set_routing(model, Own()):  # a strategy, so that every step is watched
        observe(model, find_sites(model), note)
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        stop_observing(model, note)
    places = [0] * len(recorder.trace.routers)
    for number, (scores, experts, weights) in enumerate(watched):
        router = number % len(places)
        rows = only(recorder.trace, router)
        here = slice(places[router], places[router] + len(scores))
        places[router] = here.stop
        assert np.array_equal(rows.scores[here], scores)
        assert np.array_equal(rows.experts[here], experts)
        assert np.array_equal(rows.weights[here], weights.astype(np.float32))


class Own(routing.RoutingStrategy):
    """The router's own choice."""

    def choose(self, call):
        return None


def test_threads_that_share_a_model_lose_no_token_and_each_reads_its_own_texts(plain, token_ids):
    texts = [
        torch.randint(0, 96, (1, 3 + number), generator=torch.Generator().manual_seed(number)) for number in range(3)
    ]
    rounds = 5

    def run(text):
        for _ in range(rounds):
            with torch.no_grad():
                outputs = plain(input_ids=text[:, :-1], use_cache=True)
                plain(input_ids=text[:, -1:], **kv_cache_argument(plain, outputs))

    with routing.record_routing(plain, buffer_size=4096) as recorder:
        run_at_once(run, [(text,) for text in texts])
    trace = recorder.trace
    assert (trace.num_tokens, trace.num_steps) == (
        rounds * sum(text.numel() for text in texts),
        2 * rounds * len(texts),
    )
    for router in range(len(trace.routers)):
        parts = list(trace.rows(router))
        found: dict[int, list[int]] = {}
        for token, sequence in zip(
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.sequence for part in parts]),
            strict=True,
        ):
            found.setdefault(int(sequence), []).append(int(token))
        assert sorted(found.values()) == sorted(text[0].tolist() for text in texts for _ in range(rounds))


def test_experts_of_padding_lead_to_none_of_the_next_router(plain, token_ids):
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(input_ids=token_ids, attention_mask=mask)
    statistics = recorder.trace.statistics(0)
    assert statistics.num_tokens == 14
    assert statistics.next_layer.sum() == 14 * 2 * 2


def test_a_recording_keeps_tokens_and_masks_that_the_caller_overwrites(plain, token_ids):
    buffer, mask = token_ids[:1].clone(), torch.ones(1, 9, dtype=torch.long)
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(input_ids=buffer, attention_mask=mask)
        buffer.copy_(token_ids[1:])
        mask[:, :3] = 0
        plain(input_ids=buffer, attention_mask=mask)
    (rows,) = recorder.trace.rows(0, padding=True)
    assert rows.token_ids.tolist() == token_ids.flatten().tolist()
    assert rows.is_padding.tolist() == [False] * 9 + [True] * 3 + [False] * 6
