"""Which layers come next is what the last forward did."""

from transformers_moe_offload.prefetch.prefetcher import Route

LOOPED = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]


def follow(route, places, most=2):
    """The places expected after each of these visits."""
    return [list(route.ahead(most)) for place in places if route.visit(place) in (True, False)]


def test_a_model_is_expected_to_run_its_layers_in_order_and_then_the_next_token():
    route = Route(4)
    assert follow(route, range(4)) == [[1, 2], [2, 3], [3, 0], [0, 1]]
    assert follow(route, range(4)) == [[1, 2], [2, 3], [3, 0], [0, 1]]


def test_layers_that_run_several_times_are_expected_again_once_a_forward_has_shown_it():
    route = Route(6)
    assert follow(route, LOOPED)[3:6] == [[4, 5], [3, 4], [4, 5]], "the order of the model, at first"
    assert follow(route, LOOPED) == [
        [1, 2], [2, 3], [3, 4], [2, 4], [3, 4], [2, 4], [3, 4], [4, 5], [5, 0], [0, 1],
    ]  # fmt: skip


def test_the_distance_is_the_number_of_visits_until_then():
    route = Route(6)
    follow(route, LOOPED)
    route.visit(0)
    assert route.ahead(5) == {1: 1, 2: 2, 3: 3, 4: 8, 5: 9}


def test_steps_of_a_decoder_do_not_expect_the_encoder():
    route = Route(4)
    for places in ([0, 1, 2, 3], [2, 3], [2, 3]):
        expected = follow(route, places, most=1)
    assert expected == [[3], [2]]


def test_a_forward_begins_with_its_first_visit_only():
    route = Route(6)
    assert [route.visit(place) for place in LOOPED * 2] == [number % 10 == 0 for number in range(20)]


def test_a_forward_unlike_the_last_is_expected_in_the_order_of_the_model():
    route = Route(6)
    follow(route, LOOPED)
    assert follow(route, [0, 2, 3], most=1) == [[1], [3], [4]]
