"""Memory is capped by the first way that works, for the processes under it and only as long as asked."""

import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

MIB = 1 << 20


@pytest.fixture
def cap(script):
    return script("harness.cap")


def run_under(cap, nbytes):
    """The exit code of a process that takes so many bytes under a cap."""
    code = f"held = bytearray({nbytes}); print(len(held))"
    return subprocess.run([*cap.prefix, sys.executable, "-c", code], preexec_fn=cap.join, capture_output=True)


@pytest.fixture
def limit(cap):
    """200 MiB by control groups or systemd, where there is either."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(cap.capped(200 * MIB, (cap.cgroup_v2, cap.cgroup_v1, cap.systemd_scope)))
        except cap.CapError as error:
            pytest.skip(str(error))
        yield found


def test_a_process_under_a_cap_can_have_less_and_not_more(limit):
    assert run_under(limit, 50 * MIB).returncode == 0
    assert run_under(limit, 400 * MIB).returncode != 0
    assert limit.peak() is None or 50 * MIB < limit.peak() <= 200 * MIB


def test_the_first_way_that_works_is_taken(cap):
    @contextmanager
    def broken(nbytes):
        raise OSError("not here")
        yield

    @contextmanager
    def works(nbytes):
        yield cap.Cap("mine", nbytes)

    with cap.capped(100, (broken, works)) as limit:
        assert (limit.name, limit.nbytes) == ("mine", 100)


def test_where_no_way_works_the_error_names_each_and_its_reason(cap):
    @contextmanager
    def broken_one(nbytes):
        raise PermissionError("not allowed")
        yield

    with pytest.raises(cap.CapError, match=r"broken one: not allowed.*run this as root"), cap.capped(1, (broken_one,)):
        pass


def test_the_error_of_a_measurement_is_not_taken_for_a_cap_that_does_not_work(cap):
    @contextmanager
    def works(nbytes):
        yield cap.Cap("mine", nbytes)

    with pytest.raises(OSError, match="the disk is full"), cap.capped(1, (works, works)):
        raise OSError("the disk is full")


def test_a_balloon_holds_memory_until_it_is_let_go(cap):
    with cap.inflated(32 << 10) as process:
        assert "VmLck:\t      32 kB" in Path(f"/proc/{process}/status").read_text()
    assert not Path(f"/proc/{process}").exists()


def test_a_balloon_that_cannot_be_locked_is_an_error(cap):
    with pytest.raises(cap.CapError, match="cannot lock"), cap.inflated(1 << 50):
        pass
