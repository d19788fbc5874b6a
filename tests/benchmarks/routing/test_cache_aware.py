"""The benchmark of cache-aware routing measures each strength, and its verdicts are about the recommended one."""

import json
from pathlib import Path

import pytest

LICENCE = Path(__file__).parents[3] / "LICENSE"


@pytest.fixture(scope="module")
def benchmark(script):
    return script("routing.cache_aware")


def test_quick_writes_a_row_for_each_strength_and_both_verdicts(benchmark, one_thread, tmp_path):
    licence = LICENCE.read_text()
    texts = {domain: {"held_out": [licence, licence], "train": [licence]} for domain in ("prose", "python", "c")}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    benchmark.measure_cache_aware(quick=True, text=tmp_path / "texts.json", results=tmp_path / "results", threads=1)
    (path,) = (tmp_path / "results").glob("cache-aware-*.json")
    result = json.loads(path.read_text())
    assert [one["strength"] for one in result["figures"]] == [0, 0.1, 0.15]
    written = path.with_suffix(".md").read_text()
    assert "of the misses for 1 % of perplexity" in written
    assert "times the speed from disk" in written


def test_a_promise_is_kept_by_the_recommended_strength_alone(benchmark):
    def figures(strength, misses, speed):
        return {"strength": strength, "misses": [misses] * 3, "speed": [speed] * 3, "loss": [0.001] * 3}

    result = {"figures": [figures(0, 1, 1), figures(0.2, 0.45, 1.4)], "recommended": 0.2}
    assert [kept for _, kept in benchmark.verdicts(result)] == [True, False]
    assert [kept for _, kept in benchmark.verdicts(result | {"recommended": 0})] == [False, False]
