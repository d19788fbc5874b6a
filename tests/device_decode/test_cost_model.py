"""Where decoding is faster follows from the rates, and from how many of the experts are resident."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.device_decode.cost_model import DecodeRates, costs
from transformers_moe_offload.hybrid.split import MissRates

seconds = st.floats(0, 20, allow_subnormal=False)
misses = st.builds(MissRates, fetch_s=seconds, expert_s=seconds, row_s=seconds, trip_s=seconds)
all_rates = st.builds(DecodeRates, misses, resident_s=seconds, read_s=seconds, host_s=seconds, submit_s=seconds)
shares = st.floats(0, 1)
wanted = st.integers(1, 8)


def rates(*, fetch=1.0, computed=1e9, resident=0.0, read=1.0, host=0.0, submit=0.0):
    return DecodeRates(MissRates(fetch, computed, 0.0, 0.0), resident, read, host, submit)


@given(all_rates, wanted, st.booleans())
def test_with_all_or_none_resident_nothing_is_left_to_chance(found, num_wanted, computes):
    for share, absent in ((1.0, 0), (0.0, num_wanted)):
        expected = costs(found, num_wanted, share, computes=computes)
        assert expected.from_host_s == pytest.approx(found.from_host_s(num_wanted, absent, computes=computes))
        assert expected.on_device_s == pytest.approx(found.on_device_s(num_wanted, absent))


@given(all_rates, wanted, shares)
def test_a_host_that_may_compute_is_never_slower_than_one_that_may_not(found, num_wanted, share):
    may, may_not = (costs(found, num_wanted, share, computes=computes) for computes in (True, False))
    assert may.from_host_s <= may_not.from_host_s * (1 + 1e-12)
    assert may.on_device_s == may_not.on_device_s


@given(all_rates, wanted, shares, st.booleans())
def test_what_is_expected_lies_between_the_best_and_the_worst_case(found, num_wanted, share, computes):
    expected = costs(found, num_wanted, share, computes=computes)
    cases = [found.on_device_s(num_wanted, absent) for absent in range(num_wanted + 1)]
    assert min(cases) * (1 - 1e-9) <= expected.on_device_s <= max(cases) * (1 + 1e-9)
    cases = [found.from_host_s(num_wanted, absent, computes=computes) for absent in range(num_wanted + 1)]
    assert min(cases) * (1 - 1e-9) <= expected.from_host_s <= max(cases) * (1 + 1e-9)


@given(all_rates, wanted, shares, st.floats(0.1, 20))
def test_a_host_that_is_slower_to_decide_never_makes_the_device_slower(found, num_wanted, share, more):
    slower = DecodeRates(found.misses, found.resident_s, found.read_s, found.host_s + more, found.submit_s)
    before, after = (costs(one, num_wanted, share, computes=True) for one in (found, slower))
    assert after.on_device_s == before.on_device_s
    assert after.from_host_s == pytest.approx(before.from_host_s + more)


def test_an_expert_is_absent_as_often_as_it_has_no_slot():
    found = costs(rates(fetch=1.0, read=3.0), 4, 0.25, computes=False)
    assert found.from_host_s == pytest.approx(4 * 0.75)
    assert found.on_device_s == pytest.approx(4 * 0.75 * 3)
    assert not found.is_device_faster


def test_the_wait_for_the_routing_is_what_the_device_saves():
    assert not costs(rates(host=0.0), 8, 0.5, computes=False).is_device_faster  # a tie
    assert costs(rates(host=0.1), 8, 0.5, computes=False).is_device_faster


def test_a_host_that_is_faster_than_the_link_keeps_decoding():
    """Eight misses in place take eight seconds; four moved and four computed, four."""
    found = costs(rates(computed=1.0, host=1.0), 8, 0.0, computes=True)
    assert (found.from_host_s, found.on_device_s) == (5.0, 8.0)
    assert costs(rates(computed=1.0, host=1.0), 8, 0.0, computes=False).is_device_faster


def test_hits_are_computed_while_misses_are_on_their_way():
    found = rates(fetch=2.0, resident=1.0, read=2.0)
    assert found.from_host_s(8, 2, computes=False) == 6 + 1  # six hits take longer than two loads
    assert found.from_host_s(8, 5, computes=False) == 10 + 1
    assert found.from_host_s(8, 0, computes=False) == 8
    assert found.on_device_s(8, 2) == 6 + 4


def test_a_layer_takes_no_less_than_submitting_it():
    assert rates(submit=5.0).on_device_s(8, 2) == 5.0
    assert rates(submit=5.0).on_device_s(8, 7) == 7.0
