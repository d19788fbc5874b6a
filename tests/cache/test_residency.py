import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.expert import ExpertId

EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(4)]


class Model(RuleBasedStateMachine):
    """Against the obvious: one list of slots, each empty, or with an expert and whether its load is done."""

    slots: list[list | None]
    residency: Residency

    @initialize(num_slots=st.integers(1, 6))
    def make(self, num_slots):
        self.residency = Residency(num_slots)
        self.slots = [None] * num_slots

    def absent(self):
        return [e for e in EXPERTS if all(slot is None or slot[0] != e for slot in self.slots)]

    def present(self, *, landed):
        return [slot[0] for slot in self.slots if slot is not None and slot[1] == landed]

    @precondition(lambda self: None in self.slots)
    @rule(data=st.data())
    def start(self, data):
        expert = data.draw(st.sampled_from(self.absent()))
        slot = self.residency.start(expert)
        assert self.slots[slot] is None
        self.slots[slot] = [expert, False]

    @precondition(lambda self: self.present(landed=False))
    @rule(data=st.data())
    def land(self, data):
        expert = data.draw(st.sampled_from(self.present(landed=False)))
        self.residency.land(expert)
        self.slots[self.residency.slot(expert)][1] = True

    @precondition(lambda self: self.present(landed=False))
    @rule(data=st.data())
    def fail(self, data):
        expert = data.draw(st.sampled_from(self.present(landed=False)))
        self.slots[self.residency.slot(expert)] = None
        self.residency.fail(expert)

    @precondition(lambda self: self.present(landed=True))
    @rule(data=st.data())
    def evict(self, data):
        expert = data.draw(st.sampled_from(self.present(landed=True)))
        self.slots[self.residency.slot(expert)] = None
        self.residency.evict(expert)

    @invariant()
    def every_slot_is_free_or_belongs_to_exactly_one_expert(self):
        taken = [slot for slot in self.slots if slot is not None]
        assert self.residency.num_free == len(self.slots) - len(taken)
        for index, slot in enumerate(self.slots):
            if slot is not None:
                assert self.residency.slot(slot[0]) == index

    @invariant()
    def every_expert_is_in_exactly_one_state(self):
        for expert in EXPERTS:
            states = (
                self.residency.is_absent(expert),
                self.residency.is_loading(expert),
                self.residency.is_resident(expert),
            )
            expected = (
                expert in self.absent(),
                expert in self.present(landed=False),
                expert in self.present(landed=True),
            )
            assert states == expected
            assert sum(states) == 1

    @rule(layer=st.integers(0, 2))
    def watch(self, layer):
        self.residency.keep_flags(layer, 4)

    @rule()
    def start_over(self):
        self.residency.start_over()
        self.slots = [slot if slot is not None and slot[1] else None for slot in self.slots]

    @invariant()
    def flags_are_those_of_experts_with_slots(self):
        for layer, flags in self.residency.flags.items():
            assert list(flags) == [ExpertId(layer, expert) not in self.absent() for expert in range(4)]

    @invariant()
    def residents_and_counts_agree_with_the_slots(self):
        assert sorted(self.residency.residents) == sorted(self.present(landed=True))
        for layer in range(3):
            assert self.residency.count(layer) == sum(s is not None and s[0].layer == layer for s in self.slots)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_an_expert_that_has_a_slot_is_not_given_another():
    residency = Residency(2)
    residency.start(EXPERTS[0])
    with pytest.raises(AssertionError, match="already has a slot"):
        residency.start(EXPERTS[0])
    assert residency.num_free == 1


def test_an_expert_that_is_still_loading_is_not_evicted():
    residency = Residency(1)
    residency.start(EXPERTS[0])
    with pytest.raises(AssertionError, match="still loading"):
        residency.evict(EXPERTS[0])
    assert residency.is_loading(EXPERTS[0])


def test_a_full_cache_starts_nobody():
    residency = Residency(1)
    residency.start(EXPERTS[0])
    with pytest.raises(IndexError):
        residency.start(EXPERTS[1])
    assert residency.is_absent(EXPERTS[1])
