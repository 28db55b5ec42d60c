"""`python -m flash_attn info | verify | bench | demo`."""

import argparse
import sys
from collections.abc import Sequence

from flash_attn import __version__
from flash_attn.cli import bench, demo, info, verify

COMMANDS = {"info": info, "verify": verify, "bench": bench, "demo": demo}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn", description=f"flash_attn {__version__}")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n", maxsplit=1)[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
