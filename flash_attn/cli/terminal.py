"""Tables and a progress bar in plain text."""

import sys
import time
from typing import Any, TextIO


class Table:
    """Prints a table row by row, as rows become known.

    Args:
        columns: (header, format specification), such as ("error", ">9"). A header wider than its column widens it.
    """

    def __init__(self, *columns: tuple[str, str]):
        self._specs = [f"{spec[0]}{max(len(header), int(spec[1:]))}" for header, spec in columns]
        self.row(*(header for header, _ in columns))
        print("  ".join("-" * int(spec[1:]) for spec in self._specs), flush=True)

    def row(self, *cells: Any) -> None:
        """One row; a cell wider than its column pushes the rest aside."""
        parts = [format(str(cell), spec) for cell, spec in zip(cells, self._specs, strict=True)]
        print("  ".join(parts).rstrip(), flush=True)


class Progress:
    """A bar that redraws itself on a terminal; elsewhere, such as in a log, a line for every fifth of the way."""

    WIDTH = 30

    def __init__(self, label: str, total: int, stream: TextIO | None = None):
        self._label, self._total, self._done = label, max(total, 1), 0
        self._stream = sys.stdout if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._start = time.perf_counter()

    def advance(self, note: str = "") -> None:
        """One more of `total` is done."""
        self._done += 1
        seconds = time.perf_counter() - self._start
        filled = self.WIDTH * self._done // self._total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"{self._label} [{bar}] {self._done}/{self._total}  {seconds:3.0f} s  {note}"
        is_last = self._done == self._total
        if self._is_terminal:
            self._stream.write(f"\r{line}\x1b[K" + ("\n" if is_last else ""))
        elif is_last or self._done * 5 // self._total > (self._done - 1) * 5 // self._total:
            self._stream.write(line + "\n")
        self._stream.flush()


def title(text: str) -> None:
    """A heading between parts of the output."""
    print(f"\n{text}\n{'=' * len(text)}", flush=True)
