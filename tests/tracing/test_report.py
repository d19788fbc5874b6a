"""What is drawn is what was counted."""

import builtins
import itertools
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from transformers_moe_offload.tracing import TraceError, TraceRecorder, replay
from transformers_moe_offload.tracing.report import draw_expert_use, draw_hit_rates, draw_stalls, expert_use, save


def trace_of(visits, num_experts, **options):
    recorder = TraceRecorder([f"layers.{i}" for i in range(len(num_experts))], num_experts, **options)
    for layer, wanted in visits:
        recorder.record(layer, wanted)
    recorder.finish_visit()
    return recorder.trace


VISITS = [(0, [0, 1]), (1, [2]), (0, [0]), (1, [0, 2]), (0, [0, 3])]


def lines_of(axes):
    return {line.get_label().split()[0]: line.get_xydata() for line in axes.get_lines()}


def test_the_lines_are_the_hit_rates_of_the_replays_and_the_gaps_their_distance_from_the_oracle():
    trace = trace_of(VISITS, [4, 4])
    replays = [replay(trace, name, num_slots) for name in ("lru", "lfu", "belady") for num_slots in (2, 8)]
    left, right = draw_hit_rates(replays, 8).axes
    rates = {(played.policy, played.num_slots): 100 * played.hit_rate for played in replays}
    for name, points in lines_of(left).items():
        assert points.tolist() == [[25, rates[name, 2]], [100, rates[name, 8]]]
    for name in ("lru", "lfu"):
        assert lines_of(right)[name][0].tolist() == [25, rates["belady", 2] - rates[name, 2]]


def test_the_legend_names_the_oracle_first_and_then_the_best_policy_down_to_the_worst():
    trace = trace_of([(0, [i % 3]) for i in range(30)], [4])
    replays = [replay(trace, name, 2) for name in ("lru", "random", "belady")]
    assert replays[1].hit_rate > replays[0].hit_rate
    legend = draw_hit_rates(replays, 4).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["belady (the limit)", "random", "lru"]


def test_an_expert_is_compared_with_the_average_of_its_layer_and_one_that_is_not_there_is_blank():
    uses = expert_use(trace_of(VISITS, [4, 3]))
    assert uses[0].tolist() == pytest.approx([3 / 1.25, 1 / 1.25, 0, 1 / 1.25])
    assert uses[1][:3].tolist() == [1, 0, 2]
    assert math.isnan(uses[1][3])


def test_a_layer_that_was_never_visited_is_drawn_as_unused():
    trace = trace_of([(0, [1])], [2, 2])
    assert expert_use(trace)[1].tolist() == [0, 0]
    image = draw_expert_use(trace).axes[0].get_images()[0]
    assert np.asarray(image.get_array()).tolist() == [[0, 2], [0, 0]]


def test_stalls_are_summed_by_step_and_averaged_by_layer():
    clock = iter([0, 3, 3, 4, 4, 4, 4, 12, 12, 14])
    trace = trace_of(VISITS, [4, 4], stall_ms=lambda: float(next(clock)))
    left, right = draw_stalls(trace).axes
    assert lines_of(left)["one"].tolist() == [[0, 4], [1, 8], [2, 2]]
    assert [bar.get_width() for bar in right.patches] == [5 / 3, 4.5]


def labels_of(axis):
    """The texts at an axis that are drawn, and where they are."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1.get_text() for tick in ticks], [tick.label1.get_window_extent() for tick in ticks]


@pytest.mark.parametrize("prompt", [1, 1000])
@pytest.mark.parametrize("scale_ms", [0.002, 0.0354984, 7, 3_000])
def test_stalls_of_any_length_have_readable_ticks(scale_ms, prompt):
    trace = trace_of([(layer, [0]) for _ in range(40) for layer in range(8)], [4] * 8, stall_ms=lambda: 0.0)
    trace.stall_ms = [scale_ms * (prompt if number < 8 else 1 + number % 7) for number in range(320)]
    figure = draw_stalls(trace)
    FigureCanvasAgg(figure).draw()
    left, right = figure.axes
    for axis in (left.yaxis, right.xaxis):
        texts, boxes = labels_of(axis)
        assert 3 <= len(set(texts)) == len(texts) <= 12
        assert max(map(len, texts)) <= 7
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_where_nothing_waited_the_plot_says_so():
    figure = draw_stalls(trace_of(VISITS, [4, 4], stall_ms=lambda: 0.0))
    assert [text.get_text() for text in figure.texts] == ["none of 3 steps waited for a load"]


def test_without_times_there_is_no_plot_of_stalls():
    assert draw_stalls(trace_of(VISITS, [4, 4])) is None


def test_a_plot_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    figure = draw_expert_use(trace_of(VISITS, [4, 4]))
    save(figure, tmp_path / "use.png")
    assert (tmp_path / "use.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TraceError, match=r"cannot write the plot .*nowhere"):
        save(figure, tmp_path / "nowhere" / "use.png")


def test_without_matplotlib_the_error_names_the_extra_to_install(monkeypatch):
    import_module = builtins.__import__

    def import_without_matplotlib(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", import_without_matplotlib)
    with pytest.raises(TraceError, match=r"pip install 'transformers-moe-offload\[plots\]'"):
        draw_expert_use(trace_of(VISITS, [4, 4]))
