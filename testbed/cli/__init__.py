"""The ``testbed`` command: one file a subcommand."""

import os


def start() -> None:
    """The installed command. Ctrl-C while the rest is still being imported ends it as later, without a traceback."""
    try:
        from testbed.cli.main import main

        main()
    except KeyboardInterrupt:
        os._exit(130)
