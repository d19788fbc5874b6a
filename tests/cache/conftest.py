import pytest

from stores import numbered_store

from .caches import NUM_EXPERTS, NUM_LAYERS


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return numbered_store(tmp_path_factory.mktemp("experts"), NUM_LAYERS, NUM_EXPERTS)
