"""A recorder notes visits as they come, in steps."""

from transformers_moe_offload.tracing import TraceRecorder


def test_a_step_ends_where_the_layers_begin_again():
    recorder = TraceRecorder(["a", "b", "c"], [4, 4, 4])
    for layer in (0, 1, 2, 0, 2, 2):
        recorder.record(layer, [layer])
    assert [visit.step for visit in recorder.trace.visits] == [0, 0, 0, 1, 1, 2]
    assert recorder.trace.step_tokens == [0, 0, 0]


def test_a_forward_that_is_announced_is_one_step_however_often_it_comes_to_a_layer():
    recorder = TraceRecorder(["a", "b"], [4, 4])
    for layers in ((0, 1, 0, 1), (1, 1)):
        recorder.begin_forward()
        for layer in layers:
            recorder.record(layer, [layer])
        recorder.end_forward()
    for layer in (0, 1, 0):  # not announced
        recorder.record(layer, [layer])
    assert [visit.step for visit in recorder.trace.visits] == [0, 0, 0, 0, 1, 1, 2, 2, 3]


def test_a_step_has_the_tokens_of_its_forward_and_0_where_none_was_announced():
    recorder = TraceRecorder(["a"], [4])
    for num_tokens, num_visits in ((7, 1), (3, 0), (1, 2)):
        recorder.begin_forward(num_tokens)
        for _ in range(num_visits):
            recorder.record(0, [0])
        recorder.end_forward()
    recorder.record(0, [0])
    assert recorder.trace.step_tokens == [7, 1, 0]


def test_a_forward_that_comes_to_no_sparse_layer_is_no_step():
    recorder = TraceRecorder(["a"], [4])
    for has_visits in (True, False, True):
        recorder.begin_forward()
        if has_visits:
            recorder.record(0, [0])
        recorder.end_forward()
    assert [visit.step for visit in recorder.trace.visits] == [0, 1]


def test_the_order_in_which_experts_were_wanted_is_kept():
    recorder = TraceRecorder(["a"], [4])
    recorder.record(0, [3, 0, 2])
    assert recorder.trace.visits[0].wanted == (3, 0, 2)


def test_each_visit_has_its_share_of_the_stall():
    waited = iter([10.0, 14.0, 14.0, 14.5, 14.5, 21.5])
    recorder = TraceRecorder(["a"], [4], stall_ms=lambda: next(waited))
    for _ in range(3):
        recorder.record(0, [1])
    recorder.finish_visit()
    assert recorder.trace.stall_ms == [4.0, 0.5, 7.0]


def test_a_stall_counted_from_zero_again_is_never_negative():
    waited = iter([10.0, 2.0])
    recorder = TraceRecorder(["a"], [4], stall_ms=lambda: next(waited))
    recorder.record(0, [1])
    recorder.finish_visit()
    assert recorder.trace.stall_ms == [0.0]


def test_without_a_clock_there_is_no_stall():
    recorder = TraceRecorder(["a"], [4])
    recorder.record(0, [1])
    recorder.finish_visit()
    assert recorder.trace.stall_ms is None
