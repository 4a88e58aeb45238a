"""`tryplicity --version`: what works together here, for a report of a fault."""

from __future__ import annotations

import platform
import sys
from typing import Any

import click

from tryplicity import __version__
from tryplicity.commands.options import given_plugins, say


def show_version(ctx: click.Context, parameter: Any, asked: bool) -> None:
    """Say it and end."""
    if not asked or ctx.resilient_parsing:
        return
    import torch

    from tryplicity.kernels.compiling import enabled, find_compiler
    from tryplicity.plugins import load_plugins

    compiler = find_compiler() if enabled() else "TRYPLICITY_KERNELS=0"
    plugins = [f"{plugin.name} ({plugin.origin})" for plugin in load_plugins(given_plugins(ctx)).found]
    say(f"tryplicity, version {__version__}")
    say(f"python {platform.python_version()} on {sys.platform} {platform.machine()}")
    say(f"torch {torch.__version__}" + (f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
                                         if torch.cuda.is_available() else ", no GPU"))
    say(f"kernels: {compiler}" if isinstance(compiler, str) else f"kernels: C++, by {' '.join(compiler)}")
    say(f"plugins: {', '.join(plugins)}")
    ctx.exit()


version_option = click.option("--version", is_flag=True, expose_value=False, callback=show_version,
                              help="Of this program, and of what works with it here.")
