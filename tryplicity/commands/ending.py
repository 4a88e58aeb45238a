"""How a command ends: with one of a few codes, and one line about what went wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

import click

from tryplicity.commands.options import forget_what_cannot_be_written
from tryplicity.errors import PluginFault, Refused, UserError

CODES = (0, 1, 2, 3, 130, 143)  # what a command may end with; README says what each means

#: what the command has found out already, for the case that nobody reads what it has to say about it
verdict = 0


def failed(error: BaseException) -> int:
    """One line about what ended a command, and the code it ends with."""
    from tryplicity import guard

    if isinstance(error, KeyboardInterrupt | click.Abort):
        return complain(str(error) or "interrupted", 130)  # training says what is lost
    if isinstance(error, BrokenPipeError):  # who reads the output has seen enough: the answer is the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return verdict
    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if isinstance(error, UserError):
        return complain(error, 2)
    if isinstance(error, Refused):
        return complain(error, 1)
    if os.environ.get(guard.SHOW) == "1" and not isinstance(error, PluginFault):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, PluginFault):
        return complain(error, 3)
    if guard.lacks_memory(error):
        return complain(f"this machine has too little memory for it: {guard.cause(error)}", 3)
    if (fault := guard.fault(error)) is not None:
        return complain(fault, 3)
    if isinstance(error, OSError):
        name = str(error.filename or "the system")
        name = name if len(name) < 100 else f"{name[:97]}..."
        forget_what_cannot_be_written()
        return complain(f"{name}: {error.strerror or error}", 2)
    return complain(f"{guard.cause(error)} ({guard.place(error)}): a fault of tryplicity itself; {guard.SHOW}=1 shows "
                    "the traceback, which belongs in a report of it", 3)


def complain(error: object, code: int) -> int:
    with contextlib.suppress(OSError):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return code
