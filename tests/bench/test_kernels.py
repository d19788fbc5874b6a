"""Every way to multiply is measured, for every shape and number of rows, and set against the memory's speed."""

import pytest
import torch

from transformers_moe_offload.bench.kernels import KernelProtocol, kernel_tables, measure_kernels

SMALL = KernelProtocol(shapes=((24, 128), (9, 64)), inputs=(1, 3), rounds=1, cold_bytes=1 << 18)


@pytest.fixture(scope="module")
def measured():
    begun = []
    before = torch.get_num_threads()
    result = measure_kernels(SMALL, begun.append)
    assert torch.get_num_threads() == before
    return result, begun


def test_every_way_to_multiply_has_a_time_for_every_number_of_rows(measured):
    result, begun = measured
    assert {tuple(found["shape"]) for found in result["measured"]} == set(SMALL.shapes)
    assert {found["threads"] for found in result["measured"]} == {1, torch.get_num_threads()}
    assert len(begun) == len(result["measured"]) * 3 // 2
    for found in result["measured"]:
        names = [method["name"] for method in found["methods"]]
        assert {"4-bit", "3-bit, int8 input", "4-bit, in torch", "dense bfloat16"} <= set(names)
        assert all(len(method["seconds"]) == 2 and min(method["seconds"]) > 0 for method in found["methods"])


def test_tables_name_the_shape_and_the_share_of_the_memorys_speed(measured):
    result, _ = measured
    for found, table in zip(result["measured"], kernel_tables(result), strict=True):
        rows, cols = found["shape"]
        assert table.title.startswith(f"{rows} x {cols}, threads: {found['threads']}")
        assert table.header == ["method", "MiB", "1 row", "3 rows", "GB/s", "reached"]
        assert all(len(line) == len(table.header) and line[-1].endswith("%") for line in table.rows)


def test_a_share_is_bytes_per_second_over_those_of_the_memory():
    methods = [{"name": "made", "nbytes": 4_000_000, "seconds": [0.002, 0.01]}]
    found = {"shape": (1000, 1000), "threads": 1, "memory_bytes_per_s": 8e9, "methods": methods}
    [table] = kernel_tables({"protocol": {"inputs": (1, 8)}, "measured": [found]})
    assert table.rows == [["made", "3.8", "2.000", "10.000", "2.0", "25%"]]
