"""Which experts are loaded behind a device, how fast, and in place of which."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.cache.bandwidth import Link
from transformers_moe_offload.cache.planner import plan_behind
from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.device_decode.background_fill import BackgroundFill, FollowedCache, Use
from transformers_moe_offload.device_decode.fill_plan import HALF_LIFE, LEAST_SHARE, MOST_WAITING, Pace, Urgency
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.slots.transfer import Landed
from transformers_moe_offload.tracing.replay import NoSlots

LOAD = 0.001


def use(layer, wanted, hits=()):
    return Use(layer, tuple(wanted), frozenset(hits))


def following(num_slots, layers=(0,), policy="lru", slots=None):
    """A cache whose loads take no time, and its follower, whose forwards are a second apart."""
    clock = SimpleNamespace(now=0.0)

    def tick():
        clock.now += 1.0
        return clock.now

    cache = FollowedCache(slots or NoSlots(), num_slots, dict.fromkeys(layers, 8), make_policy(policy))
    return cache, BackgroundFill(cache, tick)


def residents(cache):
    return sorted(cache.residency.residents)


def test_who_was_absent_is_there_the_next_time():
    cache, follower = following(4)
    follower.follow([[use(0, [2, 5])]])
    assert residents(cache) == []
    follower.receive()
    assert residents(cache) == [(0, 2), (0, 5)]


def test_what_the_device_says_is_what_is_counted():
    cache, follower = following(4)
    follower.follow([[use(0, [1, 2, 5], hits=[2])], [use(0, [2, 5], hits=[2, 5])]])
    stats = cache.stats[0]
    assert (stats.hits, stats.misses, stats.in_place, stats.late_hits) == (3, 2, 2, 0)


def test_who_was_brought_in_counts_as_used_and_does_not_leave_first():
    cache, follower = following(2)
    for wanted in ([0], [1], [2]):
        follower.follow([[use(0, wanted)]])
        follower.receive()
    assert residents(cache) == [(0, 1), (0, 2)]


def test_nobody_leaves_who_was_used_in_the_same_forward():
    cache, follower = following(2, layers=(0, 1))
    follower.follow([[use(0, [0]), use(1, [0])]])
    follower.receive()
    follower.follow([[use(0, [0, 1], hits=[0]), use(1, [0], hits=[0])]])
    follower.receive()
    assert residents(cache) == [(0, 0), (1, 0)]


def test_a_recorder_hears_of_it_as_of_visits():
    cache, follower = following(2)
    heard = []
    cache.on_visit = lambda layer, wanted: heard.append((layer, list(wanted)))
    follower.follow([[use(0, [3, 4])], [use(0, [1])]])
    assert heard == [(0, [3, 4]), (0, [1])]


def test_experts_that_a_visit_took_meanwhile_are_its_own():
    cache, follower = following(4)
    follower.follow([[use(0, [3])]])
    with cache.turn, cache.visit(0, [3]) as visit:
        visit.take(3)
    assert cache.stats[0].late_hits == 1
    follower.receive()
    assert residents(cache) == [(0, 3)]
    assert list(cache._policy.candidates()) == [(0, 3)]


class Failing(NoSlots):
    def start(self, expert, slot, alongside=0):
        raise RuntimeError("no copy today")


def test_a_load_that_cannot_be_started_leaves_its_expert_absent_and_its_slot_free():
    cache, follower = following(2, slots=Failing())
    with pytest.raises(RuntimeError, match="today"):
        follower.follow([[use(0, [3])]])
    assert cache.is_absent(ExpertId(0, 3))
    assert cache.residency.num_free == 2
    follower.receive()
    assert residents(cache) == []


def start(pace, num_loads):
    for _ in range(num_loads):
        pace.started()


class SlowSlots(NoSlots):
    """Loads that take as long as a forward."""

    def start(self, expert, slot, alongside=0):
        landed = Landed(0)
        landed.seconds = 1.0
        return landed


def link_of(load_seconds):
    link = Link(num_lanes=1)
    link.loaded(load_seconds)
    return link


def test_a_link_that_is_idle_is_used_for_copies_all_the_time():
    pace = Pace(link_of(LOAD))
    pace.step(10 * LOAD, num_missed=0)
    assert pace.most_loads(0) == 10


def test_until_a_copy_was_measured_few_are_under_way():
    pace = Pace(Link(1))
    pace.step(1.0, num_missed=0)
    assert [pace.most_loads(n) for n in range(MOST_WAITING + 2)] == [*range(MOST_WAITING, 0, -1), 0, 0]


@given(st.lists(st.integers(0, 40), min_size=20, max_size=200), st.integers(1, 60))
def test_copies_take_what_demand_leaves_of_the_link_and_else_their_least_share(missed, loads_of_a_step):
    """Over any number of steps: not more than the idle time and the least share of all of it, and a step's worth that
    was saved up."""
    link, spent, granted = link_of(LOAD), 0.0, 0.0
    pace, period = Pace(link), loads_of_a_step * LOAD
    for number in missed:
        pace.step(period, number)
        granted += max(LEAST_SHARE * period, link.idle_seconds(period))
        loads = pace.most_loads(0)
        start(pace, loads)
        spent += loads * LOAD
        assert spent <= granted + 1e-9
    assert spent > 0 or granted < LOAD


def test_a_pause_between_two_forwards_is_no_time_for_copies():
    pace = Pace(link_of(LOAD))
    for seconds in [10 * LOAD] * 9 + [3600.0]:
        pace.step(seconds, num_missed=0)
    assert pace.most_loads(0) == 10


def test_a_link_that_is_always_busy_still_lets_somebody_in():
    pace, loads = Pace(link_of(LOAD)), 0
    for _ in range(80):
        pace.step(4 * LOAD, num_missed=1000)
        most = pace.most_loads(0)
        start(pace, most)
        loads += most
    assert loads == 80 * 4 * LEAST_SHARE


def test_an_expert_that_takes_longer_than_a_step_is_saved_up_for():
    pace = Pace(link_of(10 * LOAD))
    loads = []
    for _ in range(40):
        pace.step(2 * LOAD, num_missed=0)
        loads.append(pace.most_loads(0))
        start(pace, loads[-1])
    assert max(loads) == 1
    assert 7 <= sum(loads) <= 8


def test_those_missed_most_often_lately_come_first():
    urgency = Urgency()
    urgency.missed([ExpertId(0, 1), ExpertId(1, 1)])
    urgency.missed([ExpertId(1, 1)])
    assert urgency.first([ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 1)]) == [(1, 1), (0, 1), (0, 0)]
    urgency.started(ExpertId(1, 1))
    assert urgency.first([ExpertId(0, 1), ExpertId(1, 1)]) == [(0, 1), (1, 1)]


def test_experts_missed_equally_often_take_turns():
    urgency, all_experts, brought_in = Urgency(), [ExpertId(layer, 0) for layer in range(5)], []
    for _ in range(10):
        urgency.missed(all_experts)
        brought_in.append(urgency.first(all_experts)[0].layer)
        urgency.started(ExpertId(brought_in[-1], 0))
    assert sorted(brought_in) == sorted([*range(5)] * 2)


def test_misses_of_long_ago_are_forgotten():
    urgency = Urgency()
    for _ in range(3):
        urgency.missed([ExpertId(0, 1)])
    for _ in range(4 * HALF_LIFE):
        urgency.missed([])
    assert urgency._missed == {}


def test_with_few_copies_the_last_layers_get_theirs():
    slots = SlowSlots()
    cache, follower = following(15, layers=range(5), slots=slots)
    hits = Counter()
    for step in range(100):
        asked = {layer: [step % 3, 7] for layer in range(5)}
        found = {
            layer: [e for e in wanted if cache.residency.is_resident(ExpertId(layer, e))]
            for layer, wanted in asked.items()
        }
        follower.follow([[use(layer, wanted, found[layer]) for layer, wanted in asked.items()]])
        follower.receive()
        hits.update({layer: len(found[layer]) for layer in asked})
    assert min(hits.values()) > max(hits.values()) / 2


experts = st.builds(ExpertId, st.integers(0, 2), st.integers(0, 5))


@given(
    num_slots=st.integers(1, 12),
    residents=st.lists(experts, unique=True),
    absent=st.lists(experts, unique=True),
    spared=st.sets(experts),
    floor=st.integers(0, 4),
)
def test_a_plan_behind_costs_no_spared_expert_no_floor_and_no_slot_twice(num_slots, residents, absent, spared, floor):
    residency = Residency(num_slots)
    residents = residents[:num_slots]
    for expert in residents:
        residency.start(expert)
        residency.land(expert)
    absent = [expert for expert in absent if expert not in residents]
    loads = plan_behind(absent, residency, residents, spared, floor)
    victims = [load.victim for load in loads if load.victim]
    assert len(set(victims)) == len(victims) == len(loads) - min(residency.num_free, len(loads))
    assert set(victims) <= set(residents) - spared
    assert [load.expert for load in loads] == [expert for expert in absent if expert in {one.expert for one in loads}]
    before, after = (Counter(expert.layer for expert in some) for some in (residents, set(residents) - set(victims)))
    gained = Counter(load.expert.layer for load in loads)
    for layer, count in before.items():
        assert after[layer] + gained[layer] >= min(count, floor)


def test_a_plan_behind_takes_victims_in_the_policys_order_and_own_ones_below_the_floor():
    residency = Residency(4)
    order = [ExpertId(0, 0), ExpertId(1, 0), ExpertId(0, 1), ExpertId(1, 1)]
    for expert in order:
        residency.start(expert)
        residency.land(expert)
    new = [ExpertId(1, 5), ExpertId(0, 5), ExpertId(0, 6)]
    loads = plan_behind(new, residency, order, (), floor=2)
    assert [(load.expert, load.victim) for load in loads] == [
        (ExpertId(1, 5), ExpertId(1, 0)),
        (ExpertId(0, 5), ExpertId(0, 0)),
        (ExpertId(0, 6), ExpertId(0, 1)),
    ]
