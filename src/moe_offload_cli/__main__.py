"""`python -m moe_offload_cli`: the same command, where the folder of scripts is not on the path."""

from moe_offload_cli.main import app

app(prog_name="moe-offload")
