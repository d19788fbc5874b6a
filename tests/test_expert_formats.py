"""`ExpertFormats`: which layer and which expert is in which format."""

import json
import time
import tracemalloc
from dataclasses import replace

import pytest

from transformers_moe_offload import ConfigError, ExpertFormats, HqqFormat, OffloadConfig

TWO, FOUR = HqqFormat(nbits=2, group_size=16), HqqFormat(nbits=4)


def test_hot_experts_have_a_format_of_their_own_whatever_their_layer_has():
    formats = ExpertFormats(default=TWO, layers={"1": None}, hot=FOUR, hot_experts={"0": [5, 2], "1-2": [0]})
    assert [formats.of_layer(layer) for layer in range(4)] == [TWO, None, TWO, TWO]
    assert [formats.hot_of_layer(layer) for layer in range(4)] == [{2, 5}, {0}, {0}, set()]
    assert formats.num_hot == 4
    assert str(formats).endswith("sparse layers 1: as they are; 4 hot experts: 4-bit, groups of 64")


def test_the_order_in_which_experts_are_named_does_not_matter():
    one, other = (ExpertFormats(default=TWO, hot_experts={"0": numbers}) for numbers in ([5, 2], (2, 5)))
    assert one == other
    assert hash(one) == hash(other)


def test_hot_experts_survive_json():
    config = OffloadConfig(experts=ExpertFormats(default=TWO, hot=FOUR, hot_experts={"0": [5, 2]}))
    assert OffloadConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
    assert config.recipe()["experts"]["hot_experts"] == {"0": [2, 5]}


def test_without_hot_experts_a_recipe_says_nothing_of_them():
    assert set(OffloadConfig(experts=TWO).recipe()["experts"]) == {"default", "layers"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot": FOUR}, r"hot=4-bit, groups of 64, but hot_experts names no experts"),
        ({"hot": FOUR, "hot_experts": {"0": []}}, r"hot_experts names no experts"),
        ({"hot": "4x64", "hot_experts": {"0": [1]}}, r"hot='4x64' is not an HqqFormat"),
        ({"hot_experts": [3]}, r"hot_experts=\[3\] is not a dictionary"),
        ({"hot_experts": {"0": 3}}, r"hot_experts\['0'\]=3 is not a list"),
        ({"hot_experts": {"0": ["3"]}}, r"has '3', which is not the number of an expert"),
        ({"hot_experts": {"0": [-1]}}, r"has -1, which is not the number of an expert"),
        ({"hot_experts": {"0": [1, 1]}}, r"names expert 1 twice"),
        ({"hot_experts": {"0-2": [1], "2": [3]}}, r"names sparse layer 2 twice, in '0-2' and '2'"),
        ({"hot_experts": {"first": [1]}}, r"hot_experts has 'first', which is not a layer's number"),
        ({"hot_expert": {"0": [1]}}, r"no option 'hot_expert'; did you mean 'hot_experts'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(experts={"default": TWO, **options})


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"4": [0]}, r"hot_experts names sparse layer '4', but the model has 2, 0 to 1"),
        ({"1": [0, 8]}, r"expert 8 of sparse layer 1, which has 8, 0 to 7; the trace may be of another model"),
    ],
)
def test_experts_that_the_model_does_not_have_are_refused(experts, message):
    with pytest.raises(ConfigError, match=message):
        ExpertFormats(default=TWO, hot=FOUR, hot_experts=experts).check([16, 8])


@pytest.mark.parametrize("asked", [HqqFormat(), {"default": HqqFormat(), "layers": {"1": HqqFormat(nbits=2)}}])
def test_how_codes_were_found_makes_no_difference_to_a_checkpoint_but_every_bit_that_is_stored_does(asked):
    def of(optimize, meta_nbits=8):
        formats = ExpertFormats.make(asked)
        changed = {"optimize": optimize, "meta_nbits": meta_nbits}
        layers = {key: replace(value, **changed) for key, value in formats.layers.items()}
        return OffloadConfig(experts=replace(formats, default=replace(formats.default, **changed), layers=layers))

    assert of(False).override(of(True)).experts == of(False).experts
    with pytest.raises(
        ConfigError, match=r"experts=4-bit, groups of 64, 16-bit scales.* quantized with experts=4-bit, groups of 64;"
    ):
        of(False).override(of(True, meta_nbits=16))
    with pytest.raises(ConfigError, match=r"experts=4-bit.* quantized with experts=None"):
        OffloadConfig(dense=HqqFormat()).override(of(True))


class TestKeysThatNobodyCountsOut:
    """A range may name any number of layers; only a model says how many there are."""

    def test_a_range_of_ten_billion_layers_is_refused_at_once(self):
        with pytest.raises(ConfigError, match="'0-9999999999', which is not a layer's number"):
            ExpertFormats(layers={"0-9999999999": None})

    def test_a_range_of_a_billion_layers_takes_no_memory(self):
        tracemalloc.start()
        formats = ExpertFormats(layers={"0-999999999": {"nbits": 4}}, hot_experts={"1-999999999": [0, 1]})
        assert formats.of_layer(7) == HqqFormat(nbits=4)
        assert formats.hot_of_layer(7) == {0, 1}
        assert hash(formats) == hash(ExpertFormats.make(formats.plain()))
        assert formats.num_hot == 2 * 999999999
        with pytest.raises(ConfigError, match="names sparse layer '0-999999999', but the model has 4, 0 to 3"):
            formats.check([8] * 4)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()

    def test_thirty_thousand_hot_experts_of_a_layer_are_read_in_no_time(self):
        start = time.process_time()
        ExpertFormats(hot_experts={"0": list(range(30_000))})
        assert time.process_time() - start < 1

    @pytest.mark.parametrize(
        "key",
        [pytest.param("9" * 4000, id="long"), "٣", True, 1.0, None, (1,), pytest.param(10**5000, id="huge"), -1, ""],
    )
    def test_a_key_that_is_no_layer_is_refused_on_one_line(self, key):
        with pytest.raises(ConfigError, match="is not a layer's number") as refused:
            ExpertFormats(layers={key: None})
        assert len(str(refused.value)) < 300

    def test_a_layer_that_is_named_as_a_number_and_as_text_is_named_twice(self):
        with pytest.raises(ConfigError, match="names sparse layer 3 twice, in 3 and '3'"):
            ExpertFormats(layers={3: None, "3": {"nbits": 4}})
