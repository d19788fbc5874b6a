"""Work for forked children, some of which will be killed."""

import multiprocessing
import sys
import threading
from collections.abc import Callable

import torch
from tqdm.std import tqdm


def with_locks_of_its_own(work: Callable[..., object], *args: object) -> None:
    """Run `work` in the child.

    The lock that tqdm draws its bars under is shared between processes: a child that is killed while it has it leaves
    it locked, and the parent's next bar waits for ever. Each class of bars has one, once it has asked for it.
    """
    lock = threading.RLock()
    kinds = [tqdm]
    while kinds:
        kind = kinds.pop()
        kind.set_lock(lock)
        kinds += kind.__subclasses__()
    work(*args)


class Child:
    """A forked child that does some work beside its parent."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)

        def run() -> None:
            torch.set_num_threads(1)  # the threads of its pool are not there
            sender.send(work())

        self._process = multiprocessing.get_context("fork").Process(target=with_locks_of_its_own, args=(run,))
        self._process.start()
        sender.close()

    def result(self) -> object:
        """What `work` returns; None if it raises, or has not ended after four minutes."""
        try:
            return self._receiver.recv() if self._receiver.poll(240) else None
        except EOFError:
            return None
        finally:
            self._process.kill()
            self._process.join()


def in_a_child(work: Callable[[], object]) -> object:
    """What some work returns in a forked child."""
    return Child(work).result()


def forget_the_package() -> None:
    """Have a child import the package anew; Transformers, which a new process would import for seconds, is there."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformers_moe_offload":
            del sys.modules[name]
