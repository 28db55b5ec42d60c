"""`python -m tools.build`: the developer's build, in place. Reads the environment; see config.py."""

import argparse
import sys
import time

from tools.build import BuildError, build, from_environment, install


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", help="ninja targets to make instead of the library, such as obj/sm80/x.cu.o"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show whole command lines")
    parser.add_argument("--no-install", action="store_true", help="leave the library in the build folder")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        config = from_environment()
        library, about = build(config, arguments.targets, verbose=arguments.verbose)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.targets:
        return 0
    if not arguments.no_install:
        install(library, about, config.root / "flash_attn")
    size = library.stat().st_size / 2**20
    print(f"flash_attn: {library.name}, {size:.1f} MiB, in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
