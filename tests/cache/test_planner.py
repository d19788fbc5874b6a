"""The promises of `plan`, for whatever is resident, loading and wanted."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.cache.capacity import layer_floor
from transformers_moe_offload.cache.planner import Load, Plan, plan
from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.expert import ExpertId

NUM_LAYERS = 3
EXPERTS = [ExpertId(layer, expert) for layer in range(NUM_LAYERS) for expert in range(5)]


def residency_of(num_slots, residents, loading=()):
    residency = Residency(num_slots)
    for expert in (*residents, *loading):
        residency.start(expert)
    for expert in residents:
        residency.land(expert)
    return residency


@st.composite
def situations(draw, *, may_be_loading=True):
    """A residency, its residents in the order in which they should leave, and the experts that one layer wants."""
    present = draw(st.permutations(EXPERTS))[: draw(st.integers(0, 10))]
    num_loading = draw(st.integers(0, len(present))) if may_be_loading else 0
    residents = present[num_loading:]
    num_slots = max(1, len(present) + draw(st.integers(0, 3)))
    residency = residency_of(num_slots, residents, present[:num_loading])
    layer = draw(st.integers(0, NUM_LAYERS - 1))
    wanted = draw(st.permutations([expert for expert in EXPERTS if expert.layer == layer]))
    return residency, residents, list(wanted[: draw(st.integers(1, 5))])


def absent_among(wanted, residency):
    return [expert for expert in wanted if residency.is_absent(expert)]


@given(situations(), st.integers(0, 4))
def test_every_absent_expert_is_loaded_or_deferred_in_the_order_of_use(situation, floor):
    residency, candidates, wanted = situation
    planned = plan(wanted, residency, candidates, floor)
    loaded = [load.expert for load in planned.loads]
    absent = absent_among(wanted, residency)
    assert sorted(loaded + list(planned.deferred)) == sorted(absent)
    assert loaded == [expert for expert in absent if expert in loaded]
    assert list(planned.deferred) == [expert for expert in absent if expert in planned.deferred]


@given(situations(), st.integers(0, 4))
def test_free_slots_go_first_and_loads_never_exceed_them_plus_the_victims(situation, floor):
    residency, candidates, wanted = situation
    planned = plan(wanted, residency, candidates, floor)
    into_free = [load.victim is None for load in planned.loads]
    assert sum(into_free) == min(residency.num_free, len(absent_among(wanted, residency)))
    assert into_free == sorted(into_free, reverse=True)


@given(situations(), st.integers(0, 4))
def test_each_victim_is_resident_and_leaves_once(situation, floor):
    residency, candidates, wanted = situation
    victims = [load.victim for load in plan(wanted, residency, candidates, floor).loads if load.victim]
    assert all(residency.is_resident(victim) for victim in victims)
    assert len(victims) == len(set(victims))


@given(situations(), st.integers(0, 4))
def test_nobody_wanted_leaves_unless_the_very_first_one_has_no_other_room(situation, floor):
    residency, candidates, wanted = situation
    loads = plan(wanted, residency, candidates, floor).loads
    for load in loads:
        if load.victim in wanted:
            residents = [expert for expert in wanted if residency.is_resident(expert)]
            assert load == Load(wanted[0], residents[-1])
            assert plan(wanted[:1], residency, [c for c in candidates if c not in wanted], floor).loads == ()


@given(situations(), st.integers(0, 4))
def test_no_load_takes_another_layer_below_its_floor(situation, floor):
    residency, candidates, wanted = situation
    counts = Counter({layer: residency.count(layer) for layer in range(NUM_LAYERS)})
    for load in plan(wanted, residency, candidates, floor).loads:
        if load.victim is not None:
            counts[load.victim.layer] -= 1
            assert load.victim.layer == load.expert.layer or counts[load.victim.layer] >= floor
        counts[load.expert.layer] += 1


@given(situations(), st.integers(0, 4))
def test_victims_leave_in_the_order_of_the_policy(situation, floor):
    residency, candidates, wanted = situation
    victims = [load.victim for load in plan(wanted, residency, candidates, floor).loads if load.victim]
    assert victims == [expert for expert in candidates if expert in victims]


@given(situations())
def test_without_a_floor_the_victims_are_the_first_candidates_nobody_wants(situation):
    residency, candidates, wanted = situation
    victims = [load.victim for load in plan(wanted, residency, candidates).loads if load.victim not in (None, *wanted)]
    assert victims == [expert for expert in candidates if expert not in wanted][: len(victims)]


@given(situations(), st.integers(0, 4))
def test_planning_changes_nothing(situation, floor):
    residency, candidates, wanted = situation
    before = (set(residency.residents), residency.num_free, [residency.is_loading(expert) for expert in EXPERTS])
    first = plan(wanted, residency, candidates, floor)
    assert plan(wanted, residency, candidates, floor) == first
    assert before == (
        set(residency.residents), residency.num_free, [residency.is_loading(expert) for expert in EXPERTS]
    )  # fmt: skip


@settings(max_examples=300)
@given(situations(may_be_loading=False))
def test_with_nothing_in_flight_the_first_one_always_finds_room_above_the_floors(situation):
    """The floors together are at most half the slots, so a layer is above its floor, or a slot is free."""
    residency, candidates, wanted = situation
    planned = plan(wanted, residency, candidates, layer_floor(residency.num_slots, NUM_LAYERS))
    assert wanted[0] not in planned.deferred


@given(st.permutations(EXPERTS[:5]), st.integers(1, 5), st.integers(0, 4))
def test_one_slot_is_enough_to_get_through_a_layer(order, num_wanted, first_resident):
    residency, resident = residency_of(1, [EXPERTS[first_resident]]), EXPERTS[first_resident]
    wanted, used = list(order[:num_wanted]), []
    while wanted:
        for load in plan(wanted, residency, [resident], layer_floor(1, NUM_LAYERS)).loads:
            residency.evict(load.victim)
            residency.start(load.expert)
            residency.land(load.expert)
            resident = load.expert
        assert residency.is_resident(wanted[0])
        used.append(wanted.pop(0))
    assert used == list(order[:num_wanted])


def test_nothing_is_planned_when_everybody_is_there():
    residency = residency_of(2, EXPERTS[:2])
    assert plan(EXPERTS[:2], residency, EXPERTS[:2]) == Plan((), ())


def test_an_expert_on_its_way_is_neither_loaded_again_nor_deferred():
    residency = residency_of(2, [], EXPERTS[:1])
    assert plan(EXPERTS[:2], residency, []) == Plan((Load(EXPERTS[1], None),), ())


def test_the_wanted_resident_that_is_needed_last_gives_way_to_the_first():
    residency = residency_of(2, [EXPERTS[1], EXPERTS[2]])
    planned = plan(EXPERTS[:3], residency, [EXPERTS[1], EXPERTS[2]])
    assert planned.loads == (Load(EXPERTS[0], EXPERTS[2]),)


def test_only_the_first_one_may_drive_out_somebody_wanted():
    residency = residency_of(1, [EXPERTS[0]])
    assert plan(EXPERTS[:2], residency, EXPERTS[:1]) == Plan((), (EXPERTS[1],))


def test_a_layer_at_its_floor_keeps_what_it_has_and_the_next_candidate_leaves():
    mine, other, third = ExpertId(0, 0), ExpertId(1, 0), ExpertId(2, 0)
    residency = residency_of(3, [other, third, ExpertId(2, 1)])
    planned = plan([mine], residency, [other, third, ExpertId(2, 1)], floor=1)
    assert planned.loads == (Load(mine, third),)
