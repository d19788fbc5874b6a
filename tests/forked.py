"""Work for a forked child that will be killed."""

import threading
from collections.abc import Callable

from tqdm.std import tqdm


def with_locks_of_its_own(work: Callable[..., object], *args: object) -> None:
    """Run `work` in the child.

    The lock that tqdm draws its bars under is shared between processes: a child that is killed while it has it leaves
    it locked, and the parent's next bar waits for ever.
    """
    tqdm.set_lock(threading.RLock())
    work(*args)
