"""The command line, called from a test."""

import sys

from robust_spectral.evaluations.commands import cli


def call(text: str) -> int:
    """Exit status of a command line."""
    arguments, sys.argv = sys.argv, ["robust-spectral", *text.split()]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = arguments
    return 0
