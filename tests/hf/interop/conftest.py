"""The command that converts."""

import pytest
from typer.testing import CliRunner

from moe_offload_cli.main import app


@pytest.fixture
def run_convert():
    """Convert a checkpoint of mixtral-offloading, and expect no error."""

    def run_convert(source, folder, *options):
        result = CliRunner().invoke(
            app, ["convert", str(source), str(folder), "--from", "mixtral-offloading", *options]
        )
        assert result.exit_code == 0, result.output
        return result

    return run_convert
