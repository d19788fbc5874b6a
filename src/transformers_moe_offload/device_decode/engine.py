"""The engine of one pool of slots on one device: kernels read experts through its table, and its cache follows.

During a forward nothing comes to the host: a layer takes `addresses`, leaves its routing behind with `note`, and
multiplies. Between two forwards, `between_steps` hears what has arrived of earlier ones, plans, starts copies, and lets
kernels know of experts that have come in. The host waits for none of it.

Prompts, and layers that are computed on the host's terms, use the same slots through `cache`, an `ExpertCache` like any
other: whoever it evicts is read in the arena again, and whoever it loads is read in a slot from the next `note` on. So
there is one account of who is where, one planner, and one policy that hears of everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.background_fill import Follower
from transformers_moe_offload.device_decode.counters import Counters
from transformers_moe_offload.device_decode.slots import AddressedSlots
from transformers_moe_offload.device_decode.streams import Streams, streams_of
from transformers_moe_offload.device_decode.table import AddressTable
from transformers_moe_offload.policies import EvictionPolicy
from transformers_moe_offload.slots.buffers import SlotPool
from transformers_moe_offload.stats import LayerStats


class DeviceEngine:
    """The experts of some sparse layers on one device, by address."""

    def __init__(
        self,
        arena: Arena,
        num_experts: Mapping[int, int],
        num_slots: int,
        policy: EvictionPolicy,
        device: torch.device,
        *,
        streams: Streams | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`num_experts` of each sparse layer that the engine serves, by the layer's index, all of them in `arena`."""
        self._arena = arena
        self._streams = streams_of(device) if streams is None else streams
        self._table = AddressTable({layer: arena.addresses(layer) for layer in num_experts}, device, self._streams)
        self._counters = Counters(self._table, self._streams)
        self._slots = AddressedSlots(arena, SlotPool(arena.smallest, device), self._table, self._streams)
        self.cache = ExpertCache(self._slots, num_slots, num_experts, policy)
        """Who is resident, for prompts and whoever else wants to hold experts."""
        self._follower = Follower(self.cache, clock)
        self.turn = self.cache.turn
        """To be held, where several threads share a model, from `note` until the kernels are submitted."""

    def addresses(self, layer: int) -> Tensor:
        """Where each expert of a layer is to be read, int64 (E,) on the device: the same tensor every time.

        It may be read by kernels on the compute stream, submitted before the next `between_steps`.
        """
        self._slots.table_is_read()
        return self._table.of(layer)

    def note(self, layer: int, top_k_index: Tensor) -> None:
        """A layer is about to read these experts by address: top_k_index (T, K) int64, on the device.

        One operation on the device, which a graph can capture. Indices that are no expert's are nobody.
        """
        self._publish()
        self._slots.table_is_read()
        self._counters.note(layer, top_k_index)

    def forget_notes(self) -> None:
        """What layers have noted since the last step was part of a capture, and nothing of it has been computed."""
        self._counters.forget()

    def before_replay(self) -> None:
        """A captured forward is about to be replayed: let it find those that a prompt has loaded."""
        with self.turn:
            self._publish()

    def between_steps(self) -> None:
        """One forward has been submitted and the next has not: follow what has become known, wait for nothing.

        Called as soon as a forward, or the replay of one, is submitted, it does its work while the device does its own.
        """
        with self.turn:
            self._slots.table_is_read()
            self._counters.close()
            self._follower.follow(self._counters.arrived())
            self._follower.receive()
            self._publish()

    @property
    def stats(self) -> Mapping[int, LayerStats]:
        """What each layer has asked for until now. The host waits for the device to know all of it."""
        with self.turn:
            self._catch_up()
            return self.cache.stats

    def resize(self, num_slots: int) -> None:
        """Change the number of slots between two forwards; who can stay stays. The addresses' tensors stay the same."""
        with self.turn:
            self._slots.table_is_read()
            self.cache.resize(num_slots)
            self._publish()

    def close(self) -> None:
        """Give slots and arena back, once the device has finished with them. No kernel may read the table again."""
        with self.turn:
            self._catch_up()
            self.cache.resize(0)
            self._streams.synchronize()
            self._arena.close()

    def _publish(self) -> None:
        """Let kernels find who has arrived; those that were submitted before are counted by what they found."""
        if self._table.has_news and not self._streams.is_capturing():
            if self._counters.has_notes:
                self._counters.close()
            self._table.publish()

    def _catch_up(self) -> None:
        """Count what is known to the device alone."""
        if self._counters.has_notes:
            self._slots.table_is_read()
            self._counters.close()
        self._follower.follow(self._counters.arrived(wait=True))
