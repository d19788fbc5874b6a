"""What the subcommands of `moe-offload` do: one file each, and beside them what they share.

How they are called, with which arguments and options, is declared in `moe_offload_cli`, which imports a file of this
package when its subcommand is called.
"""
