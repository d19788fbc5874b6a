"""Compare the dense tensors of a prebuilt checkpoint with their checksums while Transformers loads them.

Experts are checked one by one when they are first used (`store/expert_store.py`). Transformers reads dense tensors
without a check, so a damaged byte would only show in the model's answers. They are read a second time here, from the
page cache, on threads: CRC-32 takes 0.4 to 0.7 s of CPU time for each GiB (zlib 1.2.13, Xeon, one core), without the
GIL, so that other cores can load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from transformers_moe_offload.hf.loading.records import HOT_RECORDS, RECORDS
from transformers_moe_offload.tensor_files.checksum import check_tensor, checksums_of
from transformers_moe_offload.tensor_files.index import StoredTensor

_MOST_THREADS = 4
"""This many threads compute checksums faster than most disks read."""


class DenseCheck:
    """Starts the comparison; `expect_whole` waits for its end."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        dense = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in (RECORDS, HOT_RECORDS)]
        # Files that another program has rewritten have no checksums.
        expected = {path: checksums_of(path) or {} for path in dict.fromkeys(tensor.file.path for tensor in dense)}
        threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "moe-offload-checksum")
        self._checks = [
            threads.submit(check_tensor, tensor, expected[tensor.file.path][tensor.name])
            for tensor in dense
            if tensor.name in expected[tensor.file.path]
        ]
        threads.shutdown(wait=False)

    def expect_whole(self) -> None:
        """Raise `CheckpointError` for the first tensor that does not match its checksum."""
        for check in self._checks:
            check.result()
