"""Compare the dense tensors of a prebuilt checkpoint with their checksums while Transformers loads them.

Experts are compared one by one when they are first used (`store/expert_store.py`). Dense tensors are read by
Transformers, which compares nothing, so that a damaged byte would only show in what the model answers. They are read a
second time here, out of the page cache, on threads: CRC-32 takes 0.4 to 0.7 s of CPU time for each GiB (zlib 1.2.13,
Xeon, one core), and without the GIL, so that other cores load meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from transformers_moe_offload.hf.loading.records import HOT_RECORDS, RECORDS
from transformers_moe_offload.tensor_files.checksum import check_tensor, checksums_of
from transformers_moe_offload.tensor_files.index import StoredTensor

_MOST_THREADS = 4
"""These sum faster than most disks read."""


class DenseCheck:
    """The comparison, begun; `expect_whole` waits for its end."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        dense = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in (RECORDS, HOT_RECORDS)]
        # Files that another program has written again have no checksums.
        expected = {path: checksums_of(path) or {} for path in dict.fromkeys(tensor.file.path for tensor in dense)}
        threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "moe-offload-checksum")
        self._checks = [
            threads.submit(check_tensor, tensor, expected[tensor.file.path][tensor.name])
            for tensor in dense
            if tensor.name in expected[tensor.file.path]
        ]
        threads.shutdown(wait=False)

    def expect_whole(self) -> None:
        """Raise `CheckpointError` for the first tensor that is not what was written."""
        for check in self._checks:
            check.result()
