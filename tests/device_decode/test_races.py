"""1,000 steps on devices that delay and reorder, and devices that are broken on purpose."""

import pytest

from transformers_moe_offload.device_decode.slots import AddressedSlots

from .machine import NUM_LAYERS, Machine
from .streams import AdversarialStreams


def drive(machine, num_steps):
    """Decode mostly; prompts, mixed forwards, other numbers of slots and a device in another mood between."""
    for _ in range(num_steps):
        kind = machine.random.random()
        if kind < 0.85:
            machine.decode(num_tokens=machine.random.choice([1, 1, 1, 3]))
        elif kind < 0.90:
            machine.prompt()
        elif kind < 0.95:  # some layers by address, others through the host, in one forward
            for layer in range(NUM_LAYERS):
                machine.random.choice([machine.decode, machine.prompt])([layer])
        elif kind < 0.97:
            machine.resize(machine.random.randint(2, 16))
        else:
            machine.streams.haste = machine.random.choice([0.05, 0.5, 0.95])
        machine.between_steps()
        if machine.streams.problems:
            return


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_in_1000_steps_on_a_device_that_delays_and_reorders_no_kernel_finds_other_bytes(tmp_path, seed):
    machine = Machine(tmp_path, seed, num_slots=[3, 7, 12, 24][seed])
    drive(machine, 1000)
    stats = machine.finish()
    assert machine.streams.problems == []
    assert sum(layer.hits for layer in stats.values()) > 500, "slots were used"


class WithoutWaiting(AdversarialStreams):
    """Copies begin without waiting for the kernels that read the slot."""

    def copy(self, target, source, after):
        return super().copy(target, source, ())


class WithoutJoining(AdversarialStreams):
    """Kernels do not wait for copies."""

    def join(self, copy):
        pass


class Premature(AdversarialStreams):
    """Copies are over, as the host is told, when they are queued."""

    def copy(self, target, source, after):
        copy = super().copy(target, source, after)
        copy.is_done = lambda: True
        return copy

    def join(self, copy):
        pass


@pytest.mark.parametrize("broken", [WithoutWaiting, WithoutJoining, Premature])
def test_a_device_that_does_not_wait_is_found_out(tmp_path, broken):
    machine = Machine(tmp_path, 0, streams=broken(0))
    drive(machine, 300)
    machine.streams.synchronize()
    assert machine.streams.problems != []


def test_slots_that_forget_that_the_table_was_read_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(AddressedSlots, "table_is_read", lambda slots: None)
    machine = Machine(tmp_path, 0)
    drive(machine, 300)
    machine.streams.synchronize()
    assert any("nothing orders" in problem for problem in machine.streams.problems)


def test_slots_whose_visits_forget_to_retire_them_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(AddressedSlots, "retire", lambda slots, slot: None)
    machine = Machine(tmp_path, 0, num_slots=3)
    for _ in range(50):
        machine.prompt()
    machine.streams.synchronize()
    assert any("nothing orders" in problem for problem in machine.streams.problems)


def test_who_leaves_without_the_table_being_told_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(AddressedSlots, "_vacate", lambda slots, slot: None)
    machine = Machine(tmp_path, 0)
    with pytest.raises(AssertionError):  # by the table of places, before any kernel has gone wrong
        drive(machine, 300)
