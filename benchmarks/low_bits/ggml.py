"""Multiply a vector by a matrix in low bits with ggml, as it lies in the package of llama-cpp-python.

    benchmarks/made/llama-cpp/bin/python -m benchmarks.low_bits.ggml  # 14336 x 4096 and 768 x 2048, one thread

To be read beside `moe-offload bench --kernels`, run just before or after it; `disk/llama_cpp.md` says how to get the
package. Needs nothing of ours. Weights are random, and each product reads another matrix, so that they come from
memory.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from pathlib import Path

import llama_cpp
import numpy as np

TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q4_K": 12, "q3_K": 11, "q2_K": 10}
"""`enum ggml_type` of ggml.h, 0.25."""
F32 = 0

SHAPES = ((14336, 4096), (768, 2048))
COLD_BYTES = 256 << 20
ROUNDS = 5

_LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml, and what it computes with on a CPU."""
    base = ctypes.CDLL(str(_LIBRARIES / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(_LIBRARIES / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    base.ggml_init.restype, base.ggml_init.argtypes = pointer, [InitParams]
    base.ggml_free.argtypes = [pointer]
    base.ggml_new_tensor_2d.restype, base.ggml_new_tensor_2d.argtypes = pointer, [pointer, ctypes.c_int, size, size]
    base.ggml_get_data.restype, base.ggml_get_data.argtypes = pointer, [pointer]
    base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [pointer]
    base.ggml_mul_mat.restype, base.ggml_mul_mat.argtypes = pointer, [pointer] * 3
    base.ggml_new_graph.restype, base.ggml_new_graph.argtypes = pointer, [pointer]
    base.ggml_build_forward_expand.argtypes = [pointer, pointer]
    base.ggml_row_size.restype, base.ggml_row_size.argtypes = ctypes.c_size_t, [ctypes.c_int, size]
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    cpu.ggml_cpu_init.argtypes = []
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    cpu.ggml_cpu_init()
    return base, cpu


def seconds(base: ctypes.CDLL, cpu: ctypes.CDLL, kind: int, rows: int, cols: int) -> tuple[int, float]:
    """Bytes of a matrix, and the median seconds of a product."""
    nbytes = base.ggml_row_size(kind, cols) * rows
    count = max(2, -(-COLD_BYTES // nbytes))
    context = base.ggml_init(InitParams(count * (nbytes + (rows + cols) * 4 + (1 << 18)) + (64 << 20), None, False))
    random = np.random.default_rng(0)
    weights = random.standard_normal((rows, cols), dtype=np.float32)
    graphs = []
    for _ in range(count):
        matrix = base.ggml_new_tensor_2d(context, kind, cols, rows)
        vector = base.ggml_new_tensor_2d(context, F32, cols, 1)
        base.ggml_quantize_chunk(kind, weights.ctypes.data, base.ggml_get_data(matrix), 0, rows, cols, None)
        values = random.standard_normal(cols, dtype=np.float32)
        ctypes.memmove(base.ggml_get_data(vector), values.ctypes.data, values.nbytes)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, matrix, vector))
        graphs.append(graph)
    taken = []
    for _ in range(ROUNDS):
        for graph in graphs:
            started = time.process_time()
            if cpu.ggml_graph_compute_with_ctx(context, graph, 1):
                raise RuntimeError("ggml could not compute the product")
            taken.append(time.process_time() - started)
    base.ggml_free(context)
    return nbytes, statistics.median(taken[len(graphs) :])


def main() -> None:
    """One line for each shape and type."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    base, cpu = libraries()
    print(f"llama-cpp-python {llama_cpp.__version__}, one thread, CPU time")
    for rows, cols in SHAPES:
        for name, kind in TYPES.items():
            nbytes, taken = seconds(base, cpu, kind, rows, cols)
            print(f"{rows} x {cols} {name:5} {1e3 * taken:8.3f} ms  {nbytes / taken / 1e9:6.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
