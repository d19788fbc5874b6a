"""The engine of one pool of slots on one device: kernels read experts through its table, and its cache follows.

During a forward the host receives nothing: a layer takes `addresses`, stores its routing with `note`, and multiplies.
Between two forwards, `between_steps` processes the counts of earlier ones that have arrived, plans, starts copies, and
publishes the addresses of experts that have landed. The host waits for none of it.

Prompts, and layers that the host drives, use the same slots through `cache`: experts that it
evicts are read in the arena again, and experts that it loads are read in a slot from the next `note` on. So there is
one record of what is resident, one planner, and one policy that is told of every use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.background_fill import BackgroundFill, FollowedCache
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
        self.cache = FollowedCache(self._slots, num_slots, num_experts, policy)
        """The resident experts, for prompts and all other code that holds experts."""
        self._background = BackgroundFill(self.cache, clock)
        self.turn = self.cache.turn
        """To be held, where several threads share a model, from `note` until the kernels are submitted."""

    def addresses(self, layer: int) -> Tensor:
        """Where each expert of a layer is to be read, int64 (E,) on the device: the same tensor every time.

        It may be read by kernels on the compute stream, submitted before the next `between_steps`.
        """
        self._slots.table_is_read()
        return self._table.of(layer)

    def in_slots(self, layer: int) -> Tensor:
        """Which experts of a layer are read in a slot, bool (E,) on the device; the host does not wait for it."""
        return self._table.in_slots(layer)

    def note(self, layer: int, top_k_index: Tensor) -> None:
        """A layer is about to read these experts by address: top_k_index (T, K) int64, on the device.

        One operation on the device, which a graph can capture. Indices of no expert are ignored.
        """
        self._publish()
        self._slots.table_is_read()
        self._counters.note(layer, top_k_index)

    def forget_notes(self) -> None:
        """Drop the notes since the last step: they were part of a capture, and nothing was computed."""
        self._counters.forget()

    def before_replay(self) -> None:
        """A captured forward is about to be replayed: publish the addresses of experts that a prompt has loaded."""
        with self.turn:
            self._publish()

    def between_steps(self) -> None:
        """One forward has been submitted and the next has not: process the counts that have arrived, without waiting.

        Called as soon as a forward, or the replay of one, is submitted, it works while the device does.
        """
        with self.turn:
            self._slots.table_is_read()
            self._counters.close()
            self._background.follow(self._counters.arrived())
            self._background.receive()
            self._publish()

    @property
    def stats(self) -> Mapping[int, LayerStats]:
        """The counts of each layer until now. The host waits for the device, so that they are complete."""
        with self.turn:
            self._catch_up()
            return self.cache.stats

    def resize(self, num_slots: int) -> None:
        """Change the number of slots between two forwards. Residents stay as far as they fit; the tensors of addresses
        stay the same."""
        with self.turn:
            self._slots.table_is_read()
            self.cache.resize(num_slots)
            self._publish()

    def clear(self) -> None:
        """Evict every expert between two forwards: all are read in the arena again."""
        with self.turn:
            self._catch_up()
            self._slots.table_is_read()
            self.cache.clear()

    def close(self) -> None:
        """Give slots and arena back, once the device has finished with them. No kernel may read the table again."""
        with self.turn:
            self._catch_up()
            self.cache.resize(0)
            self._streams.synchronize()
            self._arena.close()

    def _publish(self) -> None:
        """Publish the addresses of experts that have arrived; kernels submitted before are counted by the old table."""
        if self._table.has_news and not self._streams.is_capturing():
            if self._counters.has_notes:
                self._counters.close()
            self._table.publish()

    def _catch_up(self) -> None:
        """Count the uses that only the device knows of; waits for them."""
        if self._counters.has_notes:
            self._slots.table_is_read()
            self._counters.close()
        self._background.follow(self._counters.arrived(wait=True))
