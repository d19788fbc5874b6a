"""An engine over a numbered store on a device of `streams.py`, driven by a seed, and what must hold of it."""

import random

import torch

from stores import numbered_store
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import make_policy

from .streams import AdversarialStreams

CPU = torch.device("cpu")
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


class Machine:
    """A device, an engine, and a model that only says which experts it routes to."""

    def __init__(self, folder, seed, num_slots=7, policy="lru", streams=None, step_seconds=1e-2):
        self.store = numbered_store(folder, NUM_LAYERS, NUM_EXPERTS)
        self.streams = streams or AdversarialStreams(seed)
        self.random = random.Random(seed + 1)
        self.now, self.step_seconds = 0.0, step_seconds
        self.arena = Arena(self.store, range(NUM_LAYERS), CPU)
        self.engine = DeviceEngine(
            self.arena,
            dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS),
            num_slots,
            make_policy(policy),
            CPU,
            streams=self.streams,
            clock=lambda: self.now,
        )
        self.homes = [self.arena.addresses(layer) for layer in range(NUM_LAYERS)]
        self.bytes = [
            [bytes(self.arena.record(ExpertId(layer, e)).numpy()) for e in range(NUM_EXPERTS)]
            for layer in range(NUM_LAYERS)
        ]
        self.hits = [0] * NUM_LAYERS
        self.asked = [0] * NUM_LAYERS
        self.visit_hits = [0] * NUM_LAYERS

    @property
    def pool(self):
        return self.engine.cache.slots.pool

    def routed(self, num_tokens=1):
        """(T, K): some experts often, the others at times; one that does not exist now and then."""
        often = self.random.random() < 0.7
        return torch.tensor(
            [
                self.random.sample(range(NUM_EXPERTS // 2 if often else NUM_EXPERTS + 1), TOP_K)
                for _ in range(num_tokens)
            ]
        )

    def decode(self, layers=range(NUM_LAYERS), num_tokens=1):
        """Submit one forward."""
        for layer in layers:
            index = self.routed(num_tokens)
            self.engine.note(layer, index)
            self._kernel(layer, set(index.flatten().tolist()) - {NUM_EXPERTS})
            self.streams.maybe_advance()

    def _kernel(self, layer, asked):
        def told(hits):
            self.hits[layer] += len(hits)

        self.asked[layer] += len(asked)
        self.streams.kernel(self.engine.addresses(layer), self.bytes[layer], asked, told, self.homes[layer])

    def prompt(self, layers=range(NUM_LAYERS)):
        """Submit a forward in which layers hold the experts that they want."""
        for layer in layers:
            wanted = self.random.sample(range(NUM_EXPERTS), self.random.randint(1, NUM_EXPERTS))
            before = self.engine.cache.stats[layer].hits
            try:
                with self.engine.cache.turn, self.engine.cache.visit(layer, wanted) as visit:
                    for expert, _ in visit:
                        slot = self.engine.cache.residency.slot(ExpertId(layer, expert))
                        self.streams.read(self.pool.record(slot), self.bytes[layer][expert])
                        self.streams.maybe_advance()
            finally:
                self.visit_hits[layer] += self.engine.cache.stats[layer].hits - before

    def resize(self, num_slots):
        """Change the number of slots; memory that was freed belongs to others from now on."""
        before = dict(self.pool._slots)
        self.engine.resize(num_slots)
        for slot, buffer in before.items():
            if self.pool._slots.get(slot) is not buffer:
                self.streams.reuse(buffer.memory)

    def between_steps(self):
        self.now += self.step_seconds
        self.engine.between_steps()
        self.check()

    def check(self):
        """What holds at any time: one expert in a slot, and the table names no slot that the cache does not."""
        residency, table = self.engine.cache.residency, self.engine._table
        known = [*residency.residents.values(), *residency.loading.values()]
        assert len(set(known)) == len(known) == residency.num_slots - residency.num_free
        in_slots = [table.address(ExpertId(layer, e)) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]
        in_slots = [address for address in in_slots if not any(address in homes for homes in self.homes)]
        assert len(set(in_slots)) == len(in_slots)
        for layer in range(NUM_LAYERS):
            for e in range(NUM_EXPERTS):
                expert, address = ExpertId(layer, e), table.address(ExpertId(layer, e))
                if address != self.homes[layer][e]:
                    assert residency.is_resident(expert)
                    assert address == self.pool.record(residency.slot(expert)).data_ptr()

    def finish(self):
        """Let everything happen, and look at what was found on the way."""
        stats = self.engine.stats
        self.streams.synchronize()
        return stats
