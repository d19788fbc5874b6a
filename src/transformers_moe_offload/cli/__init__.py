"""What the subcommands of `moe-offload` do: one file each, and beside them what they share.

`moe_offload_cli` declares their arguments and options, and imports a file of this package when its subcommand is
called.
"""
