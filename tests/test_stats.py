from dataclasses import fields

from transformers_moe_offload.stats import CacheStats, LayerStats


def test_the_total_is_the_sum_of_the_layers_in_every_count():
    names = [f.name for f in fields(LayerStats)]
    first = LayerStats(**{name: i + 1 for i, name in enumerate(names)})
    second = LayerStats(**{name: 100 * (i + 1) for i, name in enumerate(names)})
    total = CacheStats.total({"first": first, "second": second})
    assert [getattr(total, name) for name in names] == [101 * (i + 1) for i in range(len(names))]
    assert total.per_layer == {"first": first, "second": second}


def test_totalling_changes_no_layer():
    layer = LayerStats(hits=3)
    CacheStats.total({"a": layer, "b": LayerStats(hits=4)})
    assert layer == LayerStats(hits=3)


def test_the_total_of_no_layers_is_all_zero():
    assert CacheStats.total({}) == CacheStats()


def test_late_hits_are_asked_for_but_are_not_hits():
    stats = LayerStats(hits=3, late_hits=2, misses=5)
    assert stats.asked == 10
    assert stats.hit_rate == 0.3


def test_the_hit_rate_is_zero_before_anything_was_asked_for():
    assert LayerStats().hit_rate == 0.0


def test_stats_read_as_a_sentence():
    stats = CacheStats(hits=3, late_hits=0, misses=1, disk_bytes=3 << 19, stall_ms=12.3)
    assert str(stats) == "4 experts asked for: 3 hits (75.0%), 0 late hits, 1 misses; 1.5 MiB read, 12 ms waited"


def test_a_cell_of_a_notebook_shows_a_line_or_a_table_and_escapes_names():
    layers = {f"layers.{i}.<b>": LayerStats(hits=1200, misses=34, disk_bytes=5 << 20) for i in range(48)}
    stats = CacheStats.total(layers)
    assert repr(stats) == f"CacheStats({stats})"
    assert len(repr(stats)) < 160
    table = stats._repr_html_()
    assert "<b>" not in table
    assert "layers.47.&lt;b&gt;</td><td>1,234</td><td>1,200</td><td>97.2%" in table
    assert table.count("<tr>") == 50
