"""The command as its user types it, in this process."""

from __future__ import annotations

from tryplicity.cli import main
from tryplicity.commands.ending import CODES


def call(capfd, *arguments: str) -> tuple[int, str, str]:
    """The exit code, and what went to stdout and stderr: never a traceback, never another code than README names."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as end:
        code = end.code or 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and code in CODES
    return code, out, err
