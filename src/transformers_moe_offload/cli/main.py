"""The command in a process that has this package imported anyway."""

from moe_offload_cli.main import app

__all__ = ["app"]
