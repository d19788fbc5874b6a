"""A device whose streams do what is queued as late, and in as odd an order, as the marks allow; and a record of it.

Two things are checked, whatever the seed. By bytes: a kernel looks up its addresses when it begins, and reads what is
there then and once more when it ends; a copy leaves garbage in its target until it has ended. By order, of what happens
before what: a kernel and a copy that touch the same memory must be ordered by marks, whichever of them this schedule
ran first. So a mark that was forgotten is found in every run that comes near it, not only in the one that it spoils.
"""

import ctypes
import random
from collections import defaultdict, deque

import torch

GARBAGE = 0xAA


class Op:
    """One thing in a stream. It begins when those before it have ended and what it waits for is reached."""

    def __init__(self, streams, begin=lambda: None, end=lambda: None, waits=()):
        self.streams = streams
        self.begin, self.end, self.waits = begin, end, tuple(waits)
        self.has_begun = self.is_over = False
        self.seen = ()
        """How far each stream had got, at least, when this begins: (ops of compute, ops of copies)."""

    def step(self):
        if not self.has_begun:
            self.has_begun = True
            self.begin()
        else:
            self.end()
            self.is_over = True


class Mark:
    """The end of an op, as the host sees it."""

    def __init__(self, streams, stream, op):
        self.streams, self.op, self.stream = streams, op, stream
        self.number = streams.num_queued[stream]

    def is_done(self):
        self.streams.maybe_advance()
        if self.op.is_over:
            self.streams.host_sees(self)
        return self.op.is_over

    def wait(self):
        self.streams.run_until(lambda: self.op.is_over)
        self.streams.host_sees(self)


class Copy(Mark):
    @property
    def seconds(self):
        return self.streams.copy_seconds if self.op.is_over else None


class AdversarialStreams:
    """Streams of a device, driven by a seed."""

    COMPUTE, COPIES = 0, 1

    def __init__(self, seed, copy_seconds=1e-3):
        self.random = random.Random(seed)
        self.copy_seconds = copy_seconds
        self.queues = deque(), deque()
        self.num_queued = [0, 0]
        self.seen_by = [[0, 0], [0, 0]]
        """By stream, how far the streams had got when what is queued on it next begins."""
        self.host_seen = [0, 0]
        self.touched = defaultdict(list), defaultdict(list)
        """By kind (reads, writes) and address: the ops."""
        self.problems = []
        self.fail_copies = 0.0
        self.haste = 0.5
        """How likely it is the compute stream's turn."""

    # What the engine calls.

    def compute(self, work):
        self._queue(self.COMPUTE, Op(self, end=work))

    def mark(self):
        return Mark(self, self.COMPUTE, self._queue(self.COMPUTE, Op(self)))

    def copy(self, target, source, after):
        if self.random.random() < self.fail_copies:
            raise RuntimeError("the copy could not be queued")
        for mark in after:
            self._see(self.COPIES, mark)
        op = Op(self, lambda: target.fill_(GARBAGE), lambda: target.copy_(source), [mark.op for mark in after])
        self._queue(self.COPIES, op)
        self._touches("copy", 1, target.data_ptr(), self.COPIES, op)
        return Copy(self, self.COPIES, op)

    def join(self, copy):
        self._see(self.COMPUTE, copy)
        self._queue(self.COMPUTE, Op(self, waits=[copy.op]))

    def host_memory(self, shape, dtype):
        return torch.full(tuple(shape), 77, dtype=dtype)

    def is_capturing(self):
        return False

    def synchronize(self):
        self.run_until(lambda: not any(self.queues))
        self.host_seen = list(self.num_queued)

    # What tests call.

    def kernel(self, addresses, expected, asked=(), told=lambda hits: None, homes=()):
        """Queue a kernel that could read every expert of a layer: addresses (E,), and what is to be found there.

        `told` is called with those of the `asked` that were not at home.
        """
        found = []

        def begin():
            found.extend(addresses.tolist())
            for expert, address in enumerate(found):
                self._touches(f"kernel for expert {expert}", 0, address, self.COMPUTE, op)
            told({expert for expert in asked if found[expert] != homes[expert]})
            check("begins")

        def check(when):
            for expert, (address, bytes_) in enumerate(zip(found, expected, strict=True)):
                if ctypes.string_at(address, len(bytes_)) != bytes_:
                    self.problems.append(f"a kernel {when} and finds other bytes than those of expert {expert}")

        op = self._queue(self.COMPUTE, Op(self, begin, lambda: check("ends")))

    def read(self, tensor, expected):
        """Queue a kernel that reads one slot, of which it knows: uint8 (nbytes,)."""
        address = tensor.data_ptr()

        def check():
            if bytes(tensor.numpy()) != expected:
                self.problems.append("a visit's kernel finds other bytes than those of its expert")

        op = self._queue(self.COMPUTE, Op(self, check, check))
        self._touches("visit's kernel", 0, address, self.COMPUTE, op)

    def reuse(self, tensor):
        """The memory of a slot that was freed is given away, and written to on the compute stream."""
        op = self._queue(self.COMPUTE, Op(self, lambda: tensor.fill_(GARBAGE)))
        self._touches("new owner", 1, tensor.data_ptr(), self.COMPUTE, op)

    def maybe_advance(self, most=4):
        for _ in range(self.random.randrange(most + 1)):
            self._advance()

    def run_until(self, is_over):
        while not is_over():
            assert self._advance() or is_over(), "waiting for ever"

    def host_sees(self, mark):
        """The host knows that a stream has got there, and so does all that it queues from now on."""
        self.host_seen[mark.stream] = max(self.host_seen[mark.stream], mark.number)
        self.host_seen = list(map(max, self.host_seen, mark.op.seen))

    def _advance(self):
        """A step of one stream, if either can make one."""
        first = self.COMPUTE if self.random.random() < self.haste else self.COPIES
        for stream in (first, 1 - first):
            queue = self.queues[stream]
            if queue and (queue[0].has_begun or all(op.is_over for op in queue[0].waits)):
                queue[0].step()
                if queue[0].is_over:
                    queue.popleft()
                return True
        return False

    def _queue(self, stream, op):
        op.seen = tuple(map(max, self.seen_by[stream], self.host_seen))
        self.num_queued[stream] += 1
        op.number = self.num_queued[stream]
        self.queues[stream].append(op)
        return op

    def _see(self, stream, mark):
        """What is queued on a stream from now on begins after a mark, and after all that the mark's op came after."""
        seen = self.seen_by[stream]
        seen[mark.stream] = max(seen[mark.stream], mark.number)
        self.seen_by[stream] = list(map(max, seen, mark.op.seen))

    def _touches(self, what, is_write, address, stream, op):
        """Compare with every other access to this memory, where one of the two writes."""
        op.stream = stream
        for kind in (0, 1) if is_write else (1,):
            for other, other_what in self.touched[kind][address]:
                if other.stream != stream and not (
                    other.number <= op.seen[other.stream] or op.number <= other.seen[stream]
                ):
                    self.problems.append(f"nothing orders {what} and {other_what} that touch the same memory")
        self.touched[is_write][address].append((op, what))
