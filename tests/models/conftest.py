from pathlib import Path

import pytest

from models.mixtures import FFN, write_adapter


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> list[Path]:
    """Three adapters that differ in rank and in what they add to."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / "wide", 1, rank=8),
        write_adapter(folder / "narrow", 2, rank=2, use_rslora=True),
        write_adapter(folder / "all", 3, targets=[*FFN, "q_proj", "o_proj"], rank_pattern={"up_proj": 6}),
    ]
