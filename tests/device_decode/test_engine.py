"""What the engine does with whatever comes: on a device that has done everything at once, and on one that delays."""

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stores import number, numbered_store
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.background_fill import BackgroundFill, FollowedCache, Use
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.device_decode.streams import Streams
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import make_policy, policy_names
from transformers_moe_offload.slots.transfer import Landed
from transformers_moe_offload.tracing.replay import NoSlots, replay
from transformers_moe_offload.tracing.trace import RecordedVisit, Trace

from .machine import CPU, NUM_EXPERTS, NUM_LAYERS, Machine

LAYERS = range(NUM_LAYERS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return numbered_store(tmp_path_factory.mktemp("experts"), NUM_LAYERS, NUM_EXPERTS)


@pytest.fixture(scope="module")
def arena(store):
    return Arena(store, LAYERS, CPU)


def seconds():
    """A clock by which there is always time for copies."""
    now = 0.0

    def clock():
        nonlocal now
        now += 1.0
        return now

    return clock


def engine_of(arena, num_slots, policy="lru", layers=LAYERS, streams=None):
    num_experts = dict.fromkeys(layers, NUM_EXPERTS)
    return DeviceEngine(arena, num_experts, num_slots, make_policy(policy), CPU, streams=streams, clock=seconds())


def found_at(address, layout):
    """The distinct values of the weights that a kernel would read there."""
    raw = torch.frombuffer(bytearray(ctypes.string_at(address, layout.nbytes)), dtype=torch.uint8)
    return {value for weights in layout.views(raw).values() for value in weights.flatten().tolist()}


def everybody_is_where_the_table_says(engine, store):
    return all(
        found_at(int(engine.addresses(layer)[e]), store.layout(layer, e)) == {number(ExpertId(layer, e))}
        for layer in LAYERS
        for e in range(NUM_EXPERTS)
    )


def step(engine, wanted):
    """One forward of one token: wanted {layer: experts}."""
    for layer, experts in wanted.items():
        engine.note(layer, torch.tensor([experts]))
    engine.between_steps()


def test_an_expert_is_read_in_the_arena_first_and_in_a_slot_the_next_time(arena, store):
    engine = engine_of(arena, 4)
    home = int(engine.addresses(0)[5])
    assert home == arena.addresses(0)[5]
    step(engine, {0: [5]})
    assert int(engine.addresses(0)[5]) != home
    assert everybody_is_where_the_table_says(engine, store)
    step(engine, {0: [5]})
    stats = engine.stats[0]
    assert (stats.hits, stats.misses, stats.in_place) == (1, 1, 1)


def test_the_addresses_of_a_layer_are_the_same_tensor_whatever_happens(arena):
    engine = engine_of(arena, 4)
    before = engine.addresses(1)
    step(engine, {1: [5, 2]})
    engine.resize(2)
    with engine.cache.turn, engine.cache.visit(1, range(NUM_EXPERTS)) as visit:
        list(visit)
    engine.between_steps()
    assert engine.addresses(1) is before


def test_what_a_prompt_has_loaded_is_read_in_its_slots_afterwards(arena, store):
    engine = engine_of(arena, 4)
    with engine.cache.turn, engine.cache.visit(0, [1, 2, 3]) as visit:
        for expert, weights in visit:
            assert {v for tensor in weights.values() for v in tensor.flatten().tolist()} == {
                number(ExpertId(0, expert))
            }
    engine.between_steps()
    step(engine, {0: [2, 3]})
    assert engine.stats[0].hits == 2
    assert everybody_is_where_the_table_says(engine, store)


def test_a_replay_finds_what_a_prompt_has_loaded(arena):
    engine = engine_of(arena, 4)
    addresses = engine.addresses(0)
    with engine.cache.turn, engine.cache.visit(0, [1]) as visit:
        visit.take(1)
    assert addresses.tolist() == arena.addresses(0)
    engine.before_replay()
    assert addresses[1] == engine.cache.slots.pool.record(engine.cache.residency.slot(ExpertId(0, 1))).data_ptr()


def test_what_was_only_captured_is_not_counted(arena):
    engine = engine_of(arena, 4)
    engine.note(0, torch.tensor([[3, 4]]))
    engine.forget_notes()
    step(engine, {0: [5]})
    assert engine.stats[0].asked == 1
    step(engine, {})
    assert set(engine.cache.residency.residents) == {ExpertId(0, 5)}


class Capturing(Streams):
    """A graph may be being captured; then nothing may be queued but what layers do."""

    now = False

    def is_capturing(self):
        return self.now


def test_while_a_forward_is_captured_the_table_stays_as_it_is(arena):
    streams = Capturing()
    engine = engine_of(arena, 4, streams=streams)
    with engine.cache.turn, engine.cache.visit(0, [1]) as visit:
        visit.take(1)
    streams.now = True
    engine.note(0, torch.tensor([[1, 2]]))
    assert engine.addresses(0).tolist() == arena.addresses(0)
    streams.now = False
    engine.forget_notes()
    engine.note(0, torch.tensor([[1, 2]]))
    assert engine.addresses(0)[1] != arena.addresses(0)[1]


def test_what_was_counted_is_known_when_it_is_asked_for_and_not_before_the_device_has_got_there(tmp_path):
    machine = Machine(tmp_path, seed=0)
    machine.decode()
    assert sum(stats.asked for stats in machine.engine.cache.stats.values()) == 0
    assert sum(stats.asked for stats in machine.engine.stats.values()) == sum(machine.asked) > 0


class TimedSlots(NoSlots):
    """Slots that hold nothing, and loads into them that take a moment, so that a pace can be set."""

    def start(self, expert, slot, alongside=0):
        landed = Landed(0)
        landed.seconds = 1e-6
        return landed


wanted = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=2, max_size=2, unique=True)
forwards = st.lists(st.dictionaries(st.sampled_from(LAYERS), wanted), max_size=15)


@settings(deadline=None, max_examples=60)
@given(forwards, st.integers(1, 12), st.sampled_from(policy_names()))
def test_hits_counted_on_the_device_are_those_of_a_replay_through_the_planner(store, arena, trace, num_slots, policy):
    """By a cache without memory, table or device, whose follower is told what it has itself."""
    engine = engine_of(arena, num_slots, policy)
    cache = FollowedCache(TimedSlots(), num_slots, dict.fromkeys(LAYERS, NUM_EXPERTS), make_policy(policy))
    background = BackgroundFill(cache, seconds())
    for asked in trace:
        step(engine, asked)
        uses = [
            Use(
                layer,
                tuple(sorted(asked[layer])),
                frozenset(e for e in asked[layer] if cache.residency.is_resident(ExpertId(layer, e))),
            )
            for layer in sorted(asked)
        ]
        background.follow([uses])
        background.receive()
        assert set(engine.cache.residency.residents) == set(cache.residency.residents)
        assert everybody_is_where_the_table_says(engine, store)
    for layer, stats in engine.stats.items():
        assert (stats.hits, stats.misses) == (cache.stats[layer].hits, cache.stats[layer].misses)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=60), st.integers(1, 9), st.sampled_from(policy_names()))
def test_where_copies_take_no_time_one_layer_has_the_hits_of_a_cache_that_waits(arena, asked, num_slots, policy):
    """As `moe-offload replay` counts them; one expert at a time, so that no order within a forward matters."""
    engine = engine_of(arena, num_slots, policy, layers=[0])
    trace = Trace(("experts",), (NUM_EXPERTS,))
    for number_of_step, expert in enumerate(asked):
        step(engine, {0: [expert]})
        trace.visits.append(RecordedVisit(0, (expert,), number_of_step))
    assert engine.stats[0].hits == replay(trace, policy, num_slots).hits


class FailingStreams(Streams):
    """Some copies cannot be queued."""

    def __init__(self, failing):
        self.failing = failing
        self.number = -1

    def copy(self, target, source, after):
        self.number += 1
        if self.number in self.failing:
            raise RuntimeError("the copy could not be queued")
        return super().copy(target, source, after)


class FailingPolicy:
    """LRU that fails when it is asked what to evict, some times."""

    def __init__(self, failing):
        self._lru = make_policy("lru")
        self.failing = failing
        self.number = -1

    def __getattr__(self, name):
        return getattr(self._lru, name)

    def candidates(self):
        self.number += 1
        if self.number in self.failing:
            raise RuntimeError("the policy does not know")
        return self._lru.candidates()


@settings(deadline=None, max_examples=60)
@given(forwards, st.integers(1, 12), st.sets(st.integers(0, 30), max_size=6), st.booleans())
def test_a_plan_or_a_copy_that_fails_costs_nobody_their_bytes(store, arena, trace, num_slots, failing, copies):
    streams, policy = FailingStreams(failing if copies else ()), FailingPolicy(() if copies else failing)
    engine = DeviceEngine(
        arena, dict.fromkeys(LAYERS, NUM_EXPERTS), num_slots, policy, CPU, streams=streams, clock=seconds()
    )
    num_failed = 0
    for asked in trace:
        residents = set(engine.cache.residency.residents)
        try:
            step(engine, asked)
        except RuntimeError:
            num_failed += 1
            if not copies:
                assert set(engine.cache.residency.residents) == residents, "a plan that fails changes nothing"
        assert everybody_is_where_the_table_says(engine, store)
        residency = engine.cache.residency
        slots = [*residency.residents.values(), *residency.loading.values()]
        assert len(set(slots)) == len(slots) == num_slots - residency.num_free
    step(engine, {})
    assert everybody_is_where_the_table_says(engine, store)
    assert not engine.cache.num_loading


actions = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), st.integers(1, 3)),
        st.tuples(st.just("prompt"), st.just(0)),
        st.tuples(st.just("resize"), st.integers(1, 12)),
        st.tuples(st.just("haste"), st.sampled_from([0.02, 0.5, 0.98])),
        st.tuples(st.just("failing copies"), st.sampled_from([0.0, 0.3])),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions, st.integers(0, 1000), st.sampled_from(["lru", "lfru", "sieve", "least_stale"]))
def test_whatever_happens_every_kernel_finds_its_experts_and_the_device_counts_what_it_found(
    tmp_path, steps, seed, policy
):
    machine = Machine(tmp_path, seed, policy=policy)
    for action, value in steps:
        try:
            if action == "decode":
                machine.decode(num_tokens=value)
            elif action == "prompt":
                machine.prompt()
            elif action == "resize":
                machine.resize(value)
            elif action == "haste":
                machine.streams.haste = value
            else:
                machine.streams.fail_copies = value
        except RuntimeError as error:
            assert "could not be queued" in str(error)  # noqa: PT017
        try:
            machine.between_steps()
        except RuntimeError as error:
            assert "could not be queued" in str(error)  # noqa: PT017
        machine.check()
    machine.streams.fail_copies = 0.0
    stats = machine.finish()
    assert machine.streams.problems == []
    assert [stats[layer].hits for layer in LAYERS] == [
        a + b for a, b in zip(machine.hits, machine.visit_hits, strict=True)
    ]
    assert [stats[layer].in_place for layer in LAYERS] == [
        a - b for a, b in zip(machine.asked, machine.hits, strict=True)
    ]


def test_closing_waits_for_the_device_and_gives_everything_back(tmp_path):
    machine = Machine(tmp_path, seed=3)
    for _ in range(10):
        machine.decode()
        machine.between_steps()
    machine.engine.close()
    assert not any(machine.streams.queues)
    assert len(machine.pool) == 0
    assert machine.arena._records == {}
    assert machine.streams.problems == []
    machine.engine.close()
