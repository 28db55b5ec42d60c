"""Checks the text of the sources that ruff does not read: `python tools/check_format.py`.

C++ and CUDA: ASCII (hipify wants it), at most 120 columns, no tabs, no trailing blanks, one newline at the end.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_COLUMNS = 120
SUFFIXES = (".h", ".cuh", ".cu", ".cpp", ".hip")


def problems(name: str, text: str) -> Iterator[str]:
    """One line for every fault of one file's text."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.isascii():
            yield f"{name}:{number}: not ASCII"
        if len(line) > MAX_COLUMNS:
            yield f"{name}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"
        if "\t" in line:
            yield f"{name}:{number}: tab"
        if line != line.rstrip():
            yield f"{name}:{number}: trailing blanks"
    if not text.endswith("\n") or text.endswith("\n\n"):
        yield f"{name}: must end with one newline"


def main() -> int:
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)
    found = [fault for path in files for fault in problems(path.relative_to(ROOT).as_posix(), path.read_text())]
    print(*found, sep="\n", end="\n" if found else "")
    print(f"format: {len(found)} faults in {len(files)} files" if found else f"format: {len(files)} files in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
