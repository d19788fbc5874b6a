"""The GPU benchmark judges figures by what is promised; `test_gpu_quick.py` measures some."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

SETTING, MODEL = "Some-MoE, 4 bits, 8 GB", "Some-MoE-4bit"


def test_a_row_for_more_gpus_than_there_are_is_left_out_with_the_reason(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rows, lengths = script("gpu.measure"), {"prompt_tokens": 4, "steps": 1, "prefills": [], "runs": 1}
    answer = rows.measure_rows([script("gpu.rows").SPREAD], "no folder", None, 0, **lengths, repeats=0)
    (row,) = answer["rows"].values()
    assert row == {"left_out": "it needs 2 GPUs, and there are 0"}


def test_a_cap_is_the_first_that_a_process_has_to_do_with_cuda(script, monkeypatch):
    """torch 2.13 raises "did you call init?" where figures are reset before."""
    row, calls = script("gpu.measure"), []
    for name, result in {
        "device_count": 1,
        "init": None,
        "reset_peak_memory_stats": None,
        "get_device_properties": SimpleNamespace(total_memory=16),
        "set_per_process_memory_fraction": None,
    }.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda *args, name=name, result=result: calls.append((name, *args)) or result
        )
    with row.capped(4):
        assert [name for name, *_ in calls].index("init") < calls.index(("reset_peak_memory_stats", 0))
        assert calls[-1] == ("set_per_process_memory_fraction", 0.25, 0)
    assert calls[-1] == ("set_per_process_memory_fraction", 1.0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_error(script, capsys):
    with pytest.raises(script("gpu.gpu").typer.Exit) as raised:
        script("gpu.gpu").expect_gpu(quick=False)
    assert raised.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("nothing to measure: torch sees no GPU")
    assert "--quick" in said


def test_an_unknown_model_is_refused(script):
    with pytest.raises(script("gpu.gpu").typer.BadParameter, match="'GPT-5' is not one of Mixtral-8x7B"):
        script("gpu.gpu").chosen("--model", ["GPT-5"], list(script("gpu.models").PUBLISHED))


@pytest.mark.parametrize(
    ("name", "experts", "millions"),
    [("Mixtral-8x7B", 8, 176.2), ("Qwen3-30B-A3B", 128, 4.72), ("gpt-oss-20b", 32, 24.9), ("OLMoE-1B-7B", 64, 6.29)],
)
def test_shapes_are_those_of_the_published_models(script, name, experts, millions):
    """Parameters of an expert and experts of a layer: arithmetic on the sizes in the models' cards."""
    models = script("gpu.models")
    quantization, _ = models.blueprint(models.PUBLISHED[name], 4, layers=1)
    (layer,) = quantization.layers
    assert layer.num_experts == experts
    assert layer.expert_bytes / 2 / 1e6 == pytest.approx(millions, rel=2e-3)


def test_a_machine_gets_as_many_layers_as_it_holds(script):
    models = script("gpu.models")
    mixtral = models.PUBLISHED["Mixtral-8x7B"]
    enough = models.layers_that_fit(mixtral, 4, 64 << 30, 200 << 30)
    less_ram, less_disk = (
        models.layers_that_fit(mixtral, 4, *sizes) for sizes in ((16 << 30, 200 << 30), (64 << 30, 16 << 30))
    )
    assert enough == mixtral.config().num_hidden_layers
    assert 0 < less_disk <= less_ram < enough


def row(token_s, *, needed=0.0, us=10.0, digest=None, prompt_s=0.1):
    one = {"forward_s": [token_s, token_s], "needed_bytes": 2 * needed, "hits": 8, "asked": 16}
    return {
        "model": {},
        "decode": [one],
        "prefill": {"2048": [one | {"forward_s": [prompt_s], "needed_bytes": needed}]},
        "host_us_per_layer": us,
        "digest": digest,
        "memory": {"gpu_bytes": 1 << 30, "pinned_bytes": 1 << 20},
    }


@pytest.fixture
def result(script):
    """One in which all promises hold: the link lets 1e9 bytes a second through, and a token misses 1e7 of them."""
    names = script("gpu.rows")
    rows = {
        names.RESIDENT: row(0.008, digest="same", prompt_s=0.009),
        names.RESIDENT_GRAPHED: row(0.005, digest="same", prompt_s=0.009),
        names.NAIVE: row(0.5),
        names.PUBLISHED_FULL: row(0.1),
        names.HOST: row(0.03),
        names.EAGER: row(0.0125, needed=1e7, us=50.0, digest="same", prompt_s=0.012),
        names.GRAPHED: row(0.0105, needed=1e7, us=0.0, digest="same"),
        names.EAGER_PARTLY: row(0.009, digest="same"),
        names.GRAPHED_PARTLY: row(0.006, digest="same"),
    }
    made = {"name": MODEL, "layers": 2, "experts": 16, "experts_per_token": 2, "expert_bytes": 10, "dense_bytes": 10}
    link = {"pinned_bytes_per_s": 1e9, "pageable_bytes_per_s": 5e8}
    kernel = {"resident_s": 1e-5, "read_s": 1e-3, "submit_s": 1e-5}
    bandwidth = {"link": link, "gpu_bytes_per_s": 1e12, "kernel": kernel, "record_bytes": 7e6}
    return {"settings": {SETTING: {"made": made, "rows": rows}}, "bandwidth": {MODEL: bandwidth}}


def test_promises_that_hold_are_kept(script, result):
    judged = script("gpu.report").verdicts(result)
    assert len(judged) == 10
    assert [promise for promise, is_kept in judged if is_kept is not True] == []
    (table,) = script("gpu.report").tables(result)
    assert dict(zip(table.header, table.rows[6], strict=True))["reached"] == "95%"


@pytest.mark.parametrize(
    ("name", "changed", "broken"),
    [
        ("EAGER", {"host_us_per_layer": 61.0}, "eager: at most 60 us"),
        ("GRAPHED", {"host_us_per_layer": 6.0}, "graphed: at most 5 us"),
        ("EAGER", {"decode": row(0.0171, needed=1e7)["decode"]}, "eager: at least 60% of the limit"),
        ("GRAPHED", {"decode": row(0.0137, needed=1e7)["decode"]}, "graphed: at least 75% of the limit"),
        ("EAGER_PARTLY", {"decode": row(0.0101)["decode"]}, "eager, 40%: at least 80%"),
        ("GRAPHED_PARTLY", {"decode": row(0.0064)["decode"]}, "graphed, 40%: at least 80%"),
        ("PUBLISHED_FULL", {"decode": row(0.03)["decode"]}, "the best row: at least 3 times"),
        ("EAGER", {"prefill": row(1.0, needed=1e7, prompt_s=0.2)["prefill"]}, "a prompt of 2048 tokens"),
        ("GRAPHED", {"digest": "another"}, "equal logits"),
    ],
)
def test_each_promise_is_broken_by_its_own_figure(script, result, name, changed, broken):
    result = deepcopy(result)
    result["settings"][SETTING]["rows"][getattr(script("gpu.rows"), name)] |= changed
    judged = script("gpu.report").verdicts(result)
    assert [broken in promise for promise, is_kept in judged if is_kept is False] == [True]


def test_a_slow_kernel_breaks_its_promise(script, result):
    result["bandwidth"][MODEL]["kernel"]["resident_s"] = 2e-5
    (promise,) = [promise for promise, is_kept in script("gpu.report").verdicts(result) if is_kept is False]
    assert "kernels on resident experts" in promise


def test_what_was_left_out_is_not_taken_for_a_promise_kept(script, result):
    names = script("gpu.rows")
    rows = result["settings"][SETTING]["rows"]
    for name in (names.EAGER, names.PUBLISHED_FULL, names.RESIDENT, names.RESIDENT_GRAPHED):
        rows[name] = {"left_out": "OutOfMemoryError"}
    judged = dict(script("gpu.report").verdicts(result))
    assert sum(is_kept is None for is_kept in judged.values()) == 6
    (table,) = script("gpu.report").tables(result)
    assert table.rows[0][:2] == [names.RESIDENT, "left out"]


def test_accelerates_time_is_for_all_layers(script):
    found = {"layers": 10, "all_layers": 32, "decode": [{"forward_s": [1.0, 1.0]}], "prefill": {}}
    assert script("gpu.report").seconds(found) == pytest.approx(3.2)
