"""The ``testbed`` command: one file a subcommand."""
