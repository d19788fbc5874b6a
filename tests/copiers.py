"""A copier that moves nothing."""

from transformers_moe_offload.expert import ExpertId


class FakeCopier:
    """Moves nothing and records the requests; its transfers are finished at once."""

    num_lanes = 1
    is_asynchronous = False

    def __init__(self) -> None:
        self.started: list[ExpertId] = []
        self.fail_on: set[ExpertId] = set()
        """Experts whose transfer raises `OSError` when waited for."""

    def start(self, expert, slot, alongside=0):
        """Note the request."""
        self.started.append(expert)
        return _FakeTransfer(expert in self.fail_on)

    def retire(self, slot) -> None:
        """Nothing reads the slot."""

    def drain(self) -> None:
        """Nothing is ever written."""


class _FakeTransfer:
    seconds = 0.0

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def is_done(self) -> bool:
        return True

    def finish(self) -> int:
        if self._fails:
            raise OSError("the transfer was told to fail")
        return 0

    def cancel(self) -> bool:
        return False
