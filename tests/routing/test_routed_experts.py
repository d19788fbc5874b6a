"""Routes of texts as arrays, from and to other programs."""

import pickle

import numpy as np
import pytest
import torch

from transformers_moe_offload import ConfigError, routing
from transformers_moe_offload.routing import RoutingTrace
from transformers_moe_offload.tracing import TraceError
from zoo.build import build

TEXTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9]]
NUM_LAYERS, TOP_K = 4, 2


def recording(model, texts=TEXTS):
    with routing.record_routing(model) as recorder, torch.no_grad():
        for text in texts:
            model(torch.tensor([text]))
    return recorder.trace


def arrays(trace):
    return [trace.token_ids(text) for text in trace.texts], [trace.routed_experts(text) for text in trace.texts]


@pytest.fixture
def trace(plain):
    with routing.set_routing(plain, "random", seed=2):
        return recording(plain)


def test_a_text_has_an_array_of_tokens_layers_and_experts(plain, trace):
    assert trace.texts == [0, 1, 2]
    for text, ids in enumerate(TEXTS):
        assert trace.token_ids(text).tolist() == ids
        routes = trace.routed_experts(text)
        assert routes.dtype == np.int16
        assert routes.shape == (len(ids), NUM_LAYERS, TOP_K)
    rows = next(trace.rows(2))
    assert trace.routed_experts(1)[:, 2].tolist() == rows.experts[5:8].tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64])
def test_what_is_exported_is_imported_again_in_any_integers(plain, trace, dtype):
    ids, routes = arrays(trace)
    again = RoutingTrace.from_routed_experts(plain, ids, [one.astype(dtype) for one in routes])
    for text in trace.texts:
        assert again.token_ids(text).tolist() == TEXTS[text]
        assert np.array_equal(again.routed_experts(text), routes[text])
    assert again.token_counts() == trace.token_counts()
    with routing.set_routing(plain, "replay", trace=again):
        assert all(np.array_equal(one, other) for one, other in zip(routes, arrays(recording(plain))[1], strict=True))


def test_an_imported_trace_can_be_saved_and_has_statistics_and_visits(plain, trace, tmp_path):
    RoutingTrace.from_routed_experts(plain, *arrays(trace)).save(tmp_path / "trace")
    again = RoutingTrace.load(tmp_path / "trace")
    assert np.array_equal(again.routed_experts(0), trace.routed_experts(0))
    assert again.statistics(1).load.tolist() == trace.statistics(1).load.tolist()
    assert again.to_cache_trace().visits == trace.to_cache_trace().visits


def test_the_offloaded_model_takes_the_routes_of_the_plain_one(plain, offloaded, trace):
    imported = RoutingTrace.from_routed_experts(offloaded, *arrays(trace))
    assert imported.agreement(trace) == [1.0] * NUM_LAYERS


def test_the_last_token_may_have_no_row_as_a_rollout_does_not_read_it(plain, trace):
    ids, routes = arrays(trace)
    imported = RoutingTrace.from_routed_experts(plain, ids[:2], [one[:-1] for one in routes[:2]])
    text = torch.tensor([TEXTS[0]])
    with routing.set_routing(plain, "replay", trace=imported), torch.no_grad():
        with pytest.raises(TraceError, match=r"no route of token 4 \(id 5\) of row 0"):
            plain(text)
        plain(text[:, :-1])
    with routing.set_routing(plain, "replay", trace=imported, missing="last"):
        found = recording(plain, TEXTS[:2])
    assert np.array_equal(found.routed_experts(0)[:-1], routes[0][:-1])
    with (
        routing.set_routing(plain, "replay", trace=imported, missing="last"),
        pytest.raises(TraceError, match="no route of token 4"),
    ):
        recording(plain, [[*TEXTS[0], 6]])


def test_a_row_of_minus_ones_has_no_route(plain, trace):
    ids, routes = arrays(trace)
    routes[0][1] = -1
    imported = RoutingTrace.from_routed_experts(plain, ids, routes)
    text = TEXTS[:1]
    for missing in ("error", "last"):
        with (
            routing.set_routing(plain, "replay", trace=imported, missing=missing),
            pytest.raises(TraceError, match=r"no route of token 1 \(id 2\)"),
        ):
            recording(plain, text)
    with routing.set_routing(plain, "replay", trace=imported, missing="router"):
        found = recording(plain, text).routed_experts(0)
    assert np.array_equal(np.delete(found, 1, 0), np.delete(routes[0], 1, 0))
    assert (found[1] >= 0).all()


def test_recorded_weights_cannot_be_replayed_where_there_are_none(plain, trace):
    imported = RoutingTrace.from_routed_experts(plain, *arrays(trace))
    with pytest.raises(ConfigError, match="routes without weights"):
        routing.set_routing(plain, "replay", trace=imported, weights="recorded")


def test_an_axis_of_all_layers_has_the_dense_ones_too():
    """As vLLM has it; the first layers of a DeepSeek-V3 are dense."""
    model = build("deepseek_v3").eval()
    sparse = recording(model)
    num_layers = model.config.num_hidden_layers
    num_sparse = sparse.routed_experts(0).shape[1]
    assert num_sparse < num_layers
    wide = [sparse.routed_experts(text, num_layers=num_layers) for text in sparse.texts]
    assert wide[0].shape[1] == num_layers
    assert (wide[0][:, : num_layers - num_sparse] == -1).all()
    for filling in (-1, 0):
        routes = [np.where(one < 0, filling, one) for one in wide]
        again = RoutingTrace.from_routed_experts(model, TEXTS, routes)
        assert all(np.array_equal(again.routed_experts(text), sparse.routed_experts(text)) for text in sparse.texts)
    with pytest.raises(ConfigError, match=r"num_layers=1, but the sparse layers of the trace are at"):
        sparse.routed_experts(0, num_layers=1)


def test_a_file_has_plain_arrays_and_comes_back(plain, trace, tmp_path):
    path = tmp_path / "routes.npz"
    trace.save_routed_experts(path)
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].shape for name in file.files} == {
            "token_ids": (9,),
            "routed_experts": (9, NUM_LAYERS, TOP_K),
            "num_tokens": (3,),
        }
    again = RoutingTrace.load_routed_experts(plain, path)
    assert all(np.array_equal(one, other) for one, other in zip(*(arrays(t)[1] for t in (trace, again)), strict=True))


def written(path, **arrays):
    good = {
        "token_ids": np.array([1, 2]),
        "routed_experts": np.zeros((2, NUM_LAYERS, TOP_K), np.int16) + np.arange(TOP_K, dtype=np.int16),
        "num_tokens": np.array([2]),
    }
    np.savez(path, **{name: one for name, one in (good | arrays).items() if one is not None})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"num_tokens": None}, "has no array num_tokens"),
        ({"token_ids": np.array([[1, 2]])}, "token_ids is int64 of 2 dimensions, but must be integers of 1"),
        ({"routed_experts": np.zeros((2, 4, 2))}, "routed_experts is float64 of 3 dimensions"),
        ({"token_ids": np.array([1])}, "has 1 tokens and 2 routes, but texts of 2 tokens"),
        ({"num_tokens": np.array([3])}, "has 2 tokens and 2 routes, but texts of 3 tokens"),
        ({"num_tokens": np.array([2, 0])}, "a text has 0 tokens"),
        ({"token_ids": np.array([1, "a"], object)}, "cannot read routes"),
    ],
)
def test_a_file_that_contradicts_itself_is_one_error(plain, tmp_path, arrays, message):
    written(tmp_path / "routes.npz", **arrays)
    with pytest.raises(TraceError, match=message):
        RoutingTrace.load_routed_experts(plain, tmp_path / "routes.npz")


def test_other_files_are_refused(plain, trace, tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"token_ids": 1}))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "pickle.npz", "none.npz"):
        with pytest.raises(TraceError, match="cannot read routes"):
            RoutingTrace.load_routed_experts(plain, tmp_path / name)
    with pytest.raises(TraceError, match="cannot read routes"):
        RoutingTrace.load_routed_experts(plain, tmp_path / "array.npy")
    with pytest.raises(ConfigError, match=r"end in \.npz"):
        trace.save_routed_experts(tmp_path / "routes.npy")
    assert not (tmp_path / "routes.npy").exists()


ROUTES = np.tile(np.arange(TOP_K, dtype=np.int16), (2, NUM_LAYERS, 1))


@pytest.mark.parametrize(
    ("ids", "routes", "message"),
    [
        ([[1, 2]], [], "token_ids has 1 texts, and routed_experts has 0"),
        ([], [], "token_ids has 0 texts"),
        ([[]], [ROUTES], r"shape \(0,\)"),
        ([[1.5, 2.0]], [ROUTES], "token_ids of text 0 are float64"),
        ([[-1, 2]], [ROUTES], "range from -1 to 2"),
        ([[1, 2, 3, 4]], [ROUTES], "has 2 rows for 4 tokens"),
        ([[1, 2]], [ROUTES[:, 0]], r"shape \(2, 2\); pass integers \(tokens, layers, top_k\)"),
        ([[1, 2]], [ROUTES.astype(float)], "is float64"),
        ([[1, 2]], [ROUTES[:, :3]], "has 3 layers, but the model has 4 sparse ones of 4"),
        ([[1, 2]], [ROUTES[:, :, :1]], "has 1 experts for each token, but router 0 takes 2"),
        ([[1, 2]], [ROUTES + 7], "has expert 8 at router 0, which has experts 0 to 7"),
        ([[1, 2]], [ROUTES - 2], "has expert -2 at router 0"),
        ([[1, 2]], [ROUTES * 0], r"an expert twice at router 0: \[0, 0\]"),
    ],
)
def test_routes_of_another_model_or_text_are_refused_with_both_numbers(plain, ids, routes, message):
    with pytest.raises(ConfigError, match=message):
        RoutingTrace.from_routed_experts(plain, ids, routes)


def test_a_text_that_is_not_in_the_trace_is_named(trace):
    with pytest.raises(TraceError, match="text 7 is not in the trace from its beginning; it has texts 0, 1, 2"):
        trace.routed_experts(7)
