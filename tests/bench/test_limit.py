"""The limit is the slower of bringing experts in and computing with them."""

import pytest

from transformers_moe_offload.bench.limit import Crossing, as_share, is_possible, least_s


def test_bytes_cross_no_faster_than_the_bandwidth():
    assert Crossing(nbytes=300, bytes_per_s=100).seconds == 3


@pytest.mark.parametrize(
    ("crossings", "resident_s", "expected"),
    [([Crossing(300, 100)], 1.0, 3.0), ([Crossing(300, 100)], 5.0, 5.0), ([], 2.0, 2.0)],
)
def test_the_slower_of_crossing_and_computing_is_the_limit(crossings, resident_s, expected):
    assert least_s(crossings, resident_s) == expected


def test_of_several_crossings_the_slowest_counts():
    assert least_s([Crossing(300, 100), Crossing(300, 50)], 1.0) == 6.0


@pytest.mark.parametrize(("share", "said"), [(0.0, "0%"), (0.437, "44%"), (1.0, "100%"), (1.004, "100%")])
def test_a_share_is_said_in_per_cent(share, said):
    assert is_possible(share)
    assert as_share(share) == said


def test_a_share_above_one_says_that_the_limit_is_wrong():
    assert not is_possible(2.74)
    assert as_share(2.74) == "limit measured wrong"
    assert as_share(1.1, of="memory") == "memory measured wrong"
