import json
import pickle
from copy import copy, deepcopy
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.config import Budget, HqqFormat, OffloadConfig, PrefetchConfig
from transformers_moe_offload.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        (6442450944, 6 << 30),
        ("1024", 1024),
        ("6GiB", 6 << 30),
        ("6 GB", 6 * 10**9),
        (" 1.5gib ", 3 << 29),
        ("500MB", 500 * 10**6),
        ("3kb", 3000),
        ("2KiB", 2048),
        ("1TiB", 1 << 40),
        ("7b", 7),
    ],
)
def test_a_size_is_read_as_bytes(text, nbytes):
    assert Budget.parse(text, "cache_budget") == Budget(nbytes=nbytes)


@pytest.mark.parametrize(("text", "share"), [("40%", 0.4), ("100%", 1.0), ("0.5 %", 0.005)])
def test_a_percentage_is_a_share_of_all_experts(text, share):
    assert Budget.parse(text, "cache_budget") == Budget(share=share)


@pytest.mark.parametrize(
    "value",
    [0, -1, True, 1.5, None, [], "", "0", "0GiB", "-1GiB", "0%", "101%", "GiB", "6GB iB", "6 parsecs", "1e9", "0.5b"],
)
def test_what_is_no_budget_is_refused_and_named(value):
    with pytest.raises(ConfigError, match="cache_budget=") as caught:
        OffloadConfig(cache_budget=value)
    assert str(value) in str(caught.value)


def test_a_size_beyond_all_floats_is_refused_like_any_other_nonsense():
    with pytest.raises(ConfigError, match="cache_budget="):
        OffloadConfig(cache_budget="9" * 400)


@given(st.text() | st.integers() | st.floats() | st.none() | st.lists(st.integers(), max_size=2))
def test_a_budget_is_either_positive_or_a_config_error(value):
    try:
        budget = Budget.parse(value, "cache_budget")
    except ConfigError:
        return
    assert budget.nbytes is None or budget.nbytes > 0
    assert budget.share is None or 0 < budget.share <= 1


def test_bytes_are_taken_as_they_are():
    assert Budget(nbytes=500).resolve(all_experts=100, available=10) == 500


def test_a_share_is_of_all_experts_whatever_is_available():
    assert Budget(share=0.4).resolve(all_experts=1000, available=10) == 400


def test_auto_takes_what_is_available_and_never_more_than_all_experts_need():
    assert Budget().resolve(all_experts=1000, available=10) == 10
    assert Budget().resolve(all_experts=1000, available=5000) == 1000


@pytest.mark.parametrize(
    "options",
    [
        {"policy": 3},
        {"misses": "never"},
        {"misses": ["fetch"]},
        {"arithmetic": "quick"},
        {"arithmetic": {}},
        {"io_workers": 0},
        {"io_workers": -1},
        {"io_workers": 1.5},
        {"io_workers": "two"},
        {"io_workers": True},
        {"pin_memory": "yes"},
        {"pin_memory": None},
        {"pin_memory": 0},
        {"host_budget": "six"},
        {"prefetch": "on"},
        {"experts": "hqq"},
        {"dense": 4},
        {"lm_head": 8},
    ],
    ids=str,
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}="):
        OffloadConfig(**options)


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError):
        OffloadConfig(cache_bugdet="6GiB")


def test_a_misspelt_key_of_a_dictionary_is_an_error_that_suggests_the_option():
    with pytest.raises(ConfigError, match="no option 'cache_bugdet'; did you mean 'cache_budget'"):
        OffloadConfig.from_dict({"cache_bugdet": "6GiB"})


def test_a_key_unlike_any_option_is_an_error_that_lists_them():
    with pytest.raises(ConfigError, match="options are cache_budget, host_budget"):
        OffloadConfig.from_dict({"xyzzy": 1})


def test_a_config_does_not_change_once_it_is_made():
    with pytest.raises(FrozenInstanceError):
        OffloadConfig().policy = "fifo"


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.__setitem__("cache_budget", "1GiB"),
        lambda config: config.__setitem__("cache_buget", "1GiB"),
        lambda config: config.update(cache_budget="1GiB"),
        lambda config: config.setdefault("policy2", "lru"),
        lambda config: config.__ior__({"policy": "lfu"}),
        lambda config: config.__delitem__("policy"),
        lambda config: config.pop("policy"),
        lambda config: config.pop("policy", None),
        lambda config: config.popitem(),
        lambda config: config.clear(),
    ],
)
def test_the_dictionary_that_a_config_is_does_not_change_either(change):
    config = OffloadConfig(cache_budget="2GiB")
    with pytest.raises(ConfigError, match=r"cannot be changed; make another one, with dataclasses\.replace"):
        change(config)
    assert dict(config) == config.to_dict()
    assert config.cache_budget == "2GiB"


@pytest.mark.parametrize("copied", [deepcopy, copy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_is_copied_and_pickled_whole(copied):
    config = OffloadConfig(cache_budget="2GiB", prefetch=PrefetchConfig(), experts=HqqFormat(nbits=2))
    made = copied(config)
    assert made == config
    assert type(made) is OffloadConfig
    assert dict(made) == config.to_dict() == json.loads(json.dumps(config))
    assert config | {"x": 1} == {**config, "x": 1}
    assert config.pop("_commit_hash", None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"cache_budget": -(10**5000)}, {"cache_budget": 10**400}, {"cache_budget": "1" * 100_000}, {"a" * 100_000: 1},
        {"policy": ["x" * 1000] * 1000}, {"io_workers": [10**5000]}, {"mmap": "\ud800"},
        {"experts": {"nbits": 10**5000}}, {"experts": {"axis": True}}, {"dense": {"optimize": 1}},
        {"prefetch": {"min_confidence": 10**5000}}, {"prefetch": {"lookahead": {"a": {"b": {"c": ["d"] * 1000}}}}},
    ],
)  # fmt: skip
def test_values_of_any_size_are_refused_on_one_line_that_any_terminal_shows(options):
    with pytest.raises(ConfigError) as refused:
        OffloadConfig.make(options)
    assert len(str(refused.value)) < 500
    str(refused.value).encode()


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, '{"io_workers": ' + "9" * 5000 + "}", "{", '{"a": "\x00'])
def test_json_on_the_command_line_that_is_none_is_an_error_of_ours(text):
    with pytest.raises(ConfigError, match="it is not valid JSON") as refused:
        OffloadConfig.make(text)
    assert len(str(refused.value)) < 700


configs = st.builds(
    OffloadConfig,
    cache_budget=st.sampled_from([1, "6GiB", "40%", "auto"]),
    misses=st.sampled_from(["auto", "fetch"]),
    arithmetic=st.sampled_from(["fast", "exact"]),
    io_workers=st.none() | st.integers(1, 64),
    pin_memory=st.sampled_from([True, False, "auto"]),
)


@given(configs)
def test_a_config_survives_json_in_full_and_as_a_difference(config):
    assert OffloadConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
    assert OffloadConfig.from_dict(json.loads(config.to_json_string(use_diff=True))) == config


@given(configs)
def test_a_copy_equals_the_config(config):
    assert deepcopy(config) == config
    assert hash(deepcopy(config)) == hash(config)


def test_the_difference_holds_only_what_was_chosen_and_the_method():
    assert OffloadConfig().to_diff_dict() == {"quant_method": "moe_offload"}
    assert OffloadConfig(arithmetic="exact").to_diff_dict() == {"quant_method": "moe_offload", "arithmetic": "exact"}


def test_the_dictionary_holds_every_option():
    assert set(OffloadConfig().to_dict()) == {"quant_method"} | {f.name for f in fields(OffloadConfig)}


def test_from_dict_hands_back_what_is_not_ours_when_transformers_asks():
    config, unused = OffloadConfig.from_dict({"policy": "lru"}, return_unused_kwargs=True, torch_dtype="auto")
    assert config == OffloadConfig()
    assert unused == {"torch_dtype": "auto"}


@pytest.mark.parametrize("value", [None, False, "False", "none"])
def test_no_offloading_is_no_config(value):
    assert OffloadConfig.make(value) is None


@pytest.mark.parametrize("value", [True, "auto", {}, OffloadConfig(), "True", "true", " auto ", "{}"])
def test_offloading_without_wishes_is_the_default_config(value):
    assert OffloadConfig.make(value) == OffloadConfig()


def test_a_dictionary_stands_for_the_config_with_these_fields():
    assert OffloadConfig.make({"cache_budget": "6GiB"}) == OffloadConfig(cache_budget="6GiB")


def test_a_command_line_writes_the_dictionary_in_json():
    text = '{"cache_budget": "40%", "prefetch": {"lookahead": 2}, "mmap": false}'
    assert OffloadConfig.make(text) == OffloadConfig(cache_budget="40%", prefetch={"lookahead": 2}, mmap=False)
    with pytest.raises(ConfigError, match=r"it is not valid JSON.* double quotes"):
        OffloadConfig.make("{cache_budget: 40%}")


@pytest.mark.parametrize("value", ["always", 1.5, ["auto"]])
def test_what_stands_for_no_config_is_refused(value):
    with pytest.raises(ConfigError, match="moe_offload="):
        OffloadConfig.make(value)


class TestPrefetching:
    def test_is_a_config_of_its_own_a_dictionary_or_none(self):
        assert OffloadConfig(prefetch={"lookahead": 3}).prefetch == PrefetchConfig(lookahead=3)
        assert OffloadConfig(prefetch=None).prefetch is None
        with pytest.raises(ConfigError, match="prefetch=True is not a PrefetchConfig"):
            OffloadConfig(prefetch=True)

    def test_survives_json(self):
        config = OffloadConfig(prefetch=PrefetchConfig(predictor="transition", max_bytes="1MiB"))
        assert OffloadConfig.from_dict(json.loads(json.dumps(config))) == config
        assert OffloadConfig.from_dict(json.loads(config.to_json_string())) == config
        assert config.prefetch.max_nbytes == 2**20

    def test_a_misspelt_option_suggests_the_right_one(self):
        with pytest.raises(ConfigError, match="PrefetchConfig has no option 'look_ahead'; did you mean 'lookahead'"):
            OffloadConfig(prefetch={"look_ahead": 2})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lookahead": 0}, "lookahead=0 is not a number of sparse layers from 1 to 4"),
            ({"lookahead": 5}, "lookahead=5 is not"),
            ({"lookahead": True}, "lookahead=True is not"),
            ({"min_confidence": 1.5}, "min_confidence=1.5 is not a number from 0 to 1"),
            ({"min_confidence": "high"}, "min_confidence='high' is not a number"),
            ({"max_bytes": "auto"}, "max_bytes='auto' is not a size"),
            ({"max_bytes": "10%"}, "max_bytes='10%' is not a size"),
            ({"adaptive": 1}, "adaptive=1 is not True or False"),
            ({"predictor": None}, "predictor=None is not the name"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            PrefetchConfig(**options)


@pytest.mark.parametrize("option", ["mmap", "pin_memory", "direct_io"])
def test_a_switch_is_on_off_or_auto(option):
    for value in (True, False, "auto"):
        assert getattr(OffloadConfig(**{option: value}), option) == value
    with pytest.raises(ConfigError, match=f"{option}='yes' is not one of True, False, 'auto'"):
        OffloadConfig(**{option: "yes"})


@pytest.mark.parametrize("options", [{"nbits": 4.0}, {"group_size": 64.0}, {"meta_nbits": 8.0}, {"nbits": True}])
def test_numbers_of_a_format_are_whole(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not one of"):
        HqqFormat(**options)
