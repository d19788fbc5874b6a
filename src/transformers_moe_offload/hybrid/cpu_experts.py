"""The host's part in one sparse layer: it computes some absent experts while the accelerator and the link are busy.

Tokens come down from the device and rows go back up; the weights stay in host memory. The results are those of
`ExpertMlp` on a CPU, which are not bit for bit those on an accelerator.
"""

# T tokens, N rows of one expert, H hidden

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.compute.token_grouping import Grouping
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hybrid.split import MissRates, split

Hold = Callable[[int], AbstractContextManager[ExpertWeights]]
"""Opens an expert of the layer in host memory, by its index; its weights are valid until it is closed."""


def is_portable(mlp: ExpertMlp, experts: nn.Module) -> bool:
    """Whether the host can compute a module's experts: the parts of the module that it calls have no tensors."""
    has_tensors = next(experts.parameters(), None) is not None or next(experts.buffers(), None) is not None
    return not mlp.has_post_expert_norm and not has_tensors


class HostCompute:
    """A thread that computes experts, one layer's at a time. torch spreads each product over the processor's cores."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-offload-compute")

    def start(
        self, mlp: ExpertMlp, experts: nn.Module, hidden_states: Tensor, tokens: Mapping[int, Sequence[int]], hold: Hold
    ) -> HostRows:
        """Begin to compute some experts: hidden_states (T, H) on any device, and each expert's tokens."""
        down = _Landing(hidden_states.detach())

        def work() -> dict[int, Tensor]:
            rows_of = down.wait()
            outputs = {}
            with torch.no_grad():
                for expert, wanting in tokens.items():
                    rows = rows_of if len(rows_of) == len(wanting) == 1 else rows_of[wanting]
                    with hold(expert) as weights:
                        outputs[expert] = mlp(experts, rows, weights)
            return _pinned(outputs, hidden_states.device) if hidden_states.is_cuda else outputs

        return HostRows(self._thread.submit(work), hidden_states.device)

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._thread.shutdown()


class HostRows:
    """Rows that the host is computing."""

    def __init__(self, work: Future[dict[int, Tensor]], device: torch.device) -> None:
        self._work = work
        self._device = device

    def finish(self) -> dict[int, Tensor]:
        """Each expert's rows, (N, H) on the device of the tokens, or raise what went wrong."""
        return {
            expert: rows.to(self._device, non_blocking=True)  # copy: host -> device, async
            for expert, rows in self._work.result().items()
        }


class _Landing:
    """A tensor that is being copied to the host. From a GPU the copy is queued behind the kernels that compute it."""

    def __init__(self, tensor: Tensor) -> None:
        self._landed: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)  # copy: device -> host, async
        self._landed = torch.cuda.Event()
        self._landed.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor in host memory. Not to be called on the thread that feeds the GPU, which would fall idle."""
        if self._landed is not None:
            self._landed.synchronize()  # sync: device -> host
        return self._host


def _pinned(outputs: dict[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """Rows in page-locked memory, for asynchronous copies to the device. torch keeps it until they are over."""
    with torch.cuda.device(device):
        return {expert: rows.pin_memory() for expert, rows in outputs.items()}


Share = dict[int, Sequence[int]]
"""The experts that the host computes, each with the tokens that want it."""


@dataclass(frozen=True)
class HostSide:
    """What the host can do for the layers of one accelerator."""

    compute: HostCompute
    rates: MissRates
    is_at_hand: Callable[[ExpertId], bool]
    """Whether an expert is in host memory."""
    hold: Callable[[ExpertId], AbstractContextManager[ExpertWeights]]
    """Opens an expert in host memory; its weights are valid until it is closed."""

    def share(self, cache: ExpertCache, layer: int, grouping: Grouping, loads_under_way: int = 0) -> Share:
        """The experts that the host should compute in a layer that is about to be visited. Another thread's visit may
        come between; experts that it loads are then computed here for nothing."""
        absent = [expert for expert in grouping.by_last_use if cache.is_absent(ExpertId(layer, expert))]
        tokens = {expert: len(grouping.tokens[expert]) for expert in absent}
        at_hand = {expert for expert in absent if self.is_at_hand(ExpertId(layer, expert))}
        computed, _ = split(tokens, self.rates, at_hand, loads_under_way)
        return {expert: list(grouping.tokens[expert]) for expert in computed}

    def start(self, mlp: ExpertMlp, experts: nn.Module, hidden_states: Tensor, layer: int, share: Share) -> HostRows:
        """Begin to compute a share: hidden_states (T, H) on the accelerator."""
        return self.compute.start(mlp, experts, hidden_states, share, lambda expert: self.hold(ExpertId(layer, expert)))
