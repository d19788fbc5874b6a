"""The tensors of a checkpoint on the Hub: a file is downloaded when something in it is wanted."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from huggingface_hub.errors import HfHubHTTPError

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hub.weights import HubWeights
from transformers_moe_offload.tensor_files.index import StoredTensor, read_index


class HubTensors(Mapping[str, StoredTensor]):
    """By name, each stored tensor on this machine; a lookup downloads its file."""

    def __init__(self, weights: HubWeights) -> None:
        self._weights = weights
        self._file_of: dict[str, str] = {}
        self.specs: dict[str, FieldSpec] = {}
        """By name, each tensor's shape and dtype, as headers have them; nothing is downloaded."""
        for file, specs in weights.headers.items():
            for spec in specs:
                if spec.name in self.specs:
                    raise CheckpointError(
                        f"tensor {spec.name} of {weights.repo} is stored twice, in {self._file_of[spec.name]} and in "
                        f"{file}"
                    )
                self.specs[spec.name], self._file_of[spec.name] = spec, file
        self._here: dict[str, StoredTensor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> StoredTensor:
        with self._lock:
            if name not in self._here:
                self._bring(self._file_of[name])
            return self._here[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _bring(self, file: str) -> None:
        try:
            paths = self._weights.download([file])
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot download {file} of {self._weights.repo}: {' '.join(str(error).split())}"
            ) from error
        self._here |= read_index(paths)
