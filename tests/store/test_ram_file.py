"""A file in RAM holds what was written, on systems that lack what Linux has as well."""

import os

import pytest

from forked import in_a_child
from transformers_moe_offload.store.ram_file import RamFile

CONTENT = os.urandom(10_000)


@pytest.fixture(params=["memfd_create", "pwrite", "both", "none"])
def file(request, monkeypatch):
    for name in ("memfd_create", "pwrite") if request.param == "both" else (request.param,):
        monkeypatch.delattr(os, name, raising=False)
    return RamFile("test", len(CONTENT))


def read(file, start=0, stop=10_000):
    target = bytearray(stop - start)
    file.read_into(memoryview(target), start)
    return bytes(target)


def test_what_is_written_is_read(file):
    for start in (5000, 0):
        file.write(memoryview(CONTENT)[start : start + 5000], start)
    assert read(file) == CONTENT
    assert bytes(file.mapped().bytes.numpy()) == CONTENT
    assert bytes(file.shared().numpy()) == CONTENT


def test_it_may_be_written_to_while_it_is_open(file):
    file.write(memoryview(CONTENT), 0)
    assert read(file) == CONTENT
    file.write(memoryview(b"changed"), 9_000)
    file.close()
    assert read(file, 8_990, 9_010) == CONTENT[8_990:9_000] + b"changed" + CONTENT[9_007:9_010]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.usefixtures("file")
def test_a_child_that_ends_leaves_it_to_its_parent():
    own = RamFile("own", len(CONTENT))
    own.write(memoryview(CONTENT), 0)
    path, kept = own.path, [own]
    del own

    def forget():
        found = read(kept[0])
        kept.clear()
        return found

    assert in_a_child(forget) == CONTENT
    kept[0].close()
    assert read(kept[0]) == CONTENT
    kept.clear()
    assert not path.exists()
