"""The command line: one file a subcommand, and beside them what the subcommands share."""
