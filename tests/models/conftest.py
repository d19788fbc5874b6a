from pathlib import Path

import pytest

from models.mixtures import write_three


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> list[Path]:
    return write_three(tmp_path_factory.mktemp("adapters"))
