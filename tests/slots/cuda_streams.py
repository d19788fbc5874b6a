"""A small stand-in for the part of `torch.cuda` that copies to a GPU use: streams that run only when they are told to.

Work on a stream is queued, in order, and nothing of it happens until a test runs the stream or synchronizes with an
event on it. So a copy that forgot to wait for a kernel overtakes it in every run, and not once in a million.
"""

import threading
from collections import deque
from contextlib import contextmanager
from itertools import count

import torch


class Stream:
    def __init__(self, device=None):
        self.queue = deque()
        self._running = threading.Lock()

    def enqueue(self, work, is_ready=lambda: True):
        self.queue.append((work, is_ready))

    def run(self):
        """Do what is queued, up to the first thing that waits for another stream; one thread at a time, in order."""
        with self._running:
            while self.queue and self.queue[0][1]():
                self.queue.popleft()[0]()

    def wait_event(self, event):
        self.enqueue(lambda: None, event.reached_by_now())

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """As in CUDA, one that was never recorded counts as reached."""

    machine = None

    def __init__(self, enable_timing=False):
        self.is_timed = enable_timing
        self.last_mark = None
        self.tick = None

    def record(self, stream):
        mark = self.last_mark = threading.Event()

        def reach():
            self.tick = self.machine.tick()
            mark.set()

        stream.enqueue(reach)

    def query(self):
        return self.reached_by_now()()

    def elapsed_time(self, other):
        """Milliseconds; a tick of the machine is one."""
        assert self.is_timed
        assert other.is_timed
        return float(other.tick - self.tick)

    def reached_by_now(self):
        mark = self.last_mark
        return lambda: mark is None or mark.is_set()

    def synchronize(self):
        reached = self.reached_by_now()
        while not reached():
            assert self.machine.run_all() or reached(), "waiting for ever"


class Machine:
    """One GPU: the stream that computes and the streams that were made."""

    def __init__(self):
        self.compute = Stream()
        self.made = []
        self.kept_for = []
        self._current = threading.local()
        self._ticks = count()
        self._memory = type("Memory", (_DeviceMemory,), {"machine": self})  # parts of a slot are of the same class

    @property
    def copies(self):
        (stream,) = self.made
        return stream

    def tick(self):
        return next(self._ticks)

    def current_stream(self, device=None):
        return getattr(self._current, "stream", self.compute)

    def new_stream(self, device=None):
        self.made.append(Stream())
        return self.made[-1]

    @contextmanager
    def stream(self, stream):
        outer, self._current.stream = self.current_stream(), stream
        yield
        self._current.stream = outer

    def run_all(self):
        """Run every stream to its end; returns whether there was anything to do."""
        before = self._queued()
        for _ in range(before + 1):
            for stream in (*self.made, self.compute):
                stream.run()
        return self._queued() < before

    def _queued(self):
        return sum(len(stream.queue) for stream in (*self.made, self.compute))

    def slot(self, nbytes):
        """Memory of this GPU, zeroed: what is copied into it arrives when its stream gets there."""
        return torch.zeros(nbytes, dtype=torch.uint8).as_subclass(self._memory)

    def install(self, monkeypatch):
        """Put this machine in the place of `torch.cuda`."""
        monkeypatch.setattr(Event, "machine", self)
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)


class _DeviceMemory(torch.Tensor):
    def copy_(self, source, non_blocking=False):
        assert non_blocking
        target = self.as_subclass(torch.Tensor)
        self.machine.current_stream().enqueue(lambda: target.copy_(source))
        return self

    def record_stream(self, stream):
        """The allocator keeps the memory until the stream has got this far, whichever reference is dropped."""
        self.machine.kept_for.append((self.data_ptr(), stream))
