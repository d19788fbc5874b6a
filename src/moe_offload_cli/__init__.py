"""The command `moe-offload` as it is typed: its subcommands, their arguments and options, and their help.

Only that, and no more imports than it takes, so that help, completion and a misspelt option are answered at once. It is
a package of its own because importing any part of `transformers_moe_offload` imports torch and Transformers: importing
it installs the plugin. The file of the same name in `transformers_moe_offload.cli` does the work of a subcommand; it is
imported when the command line has been parsed.
"""
