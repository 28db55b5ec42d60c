"""Writes build.ninja and runs it."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.build.errors import BuildError


@dataclass(frozen=True)
class Rule:
    """A command line over $in, $out and $flags."""

    command: str
    description: str
    depfile: str = ""  # where the compiler writes the headers it read


@dataclass(frozen=True)
class Step:
    """One use of a rule."""

    rule: str
    inputs: tuple[Path, ...]
    output: Path
    flags: tuple[str, ...] = ()
    after: tuple[Path, ...] = field(default=())  # inputs that do not appear in $in


def escape(value: object) -> str:
    """A path or flag as ninja reads it."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(flag: str) -> str:
    """A flag as ninja hands it to the shell."""
    text = flag.replace("$", "$$")
    return f"'{text}'" if any(char in text for char in ' ;()<>*"') else text


def render(rules: dict[str, Rule], steps: Iterable[Step], default: Path) -> str:
    """The text of a build.ninja that makes `default`."""
    lines = ["ninja_required_version = 1.5", ""]
    for name, rule in rules.items():
        lines += [f"rule {name}", f"  command = {rule.command}", f"  description = {rule.description}"]
        if rule.depfile:
            lines += ["  deps = gcc", f"  depfile = {rule.depfile}"]
        lines.append("")
    for step in steps:
        inputs = " ".join(escape(path) for path in step.inputs)
        after = "".join(f" {escape(path)}" for path in step.after)
        lines.append(f"build {escape(step.output)}: {step.rule} {inputs}" + (f" |{after}" if after else ""))
        lines.append(f"  flags = {' '.join(quote(flag) for flag in step.flags)}")
    return "\n".join([*lines, "", f"default {escape(default)}", ""])


def find_ninja() -> list[str]:
    """ninja from PATH, or from the pip package of that name."""
    path = shutil.which("ninja") or shutil.which("ninja-build")
    if path is not None:
        return [path]
    try:
        import ninja
    except ImportError:
        raise BuildError("ninja was not found (pip install ninja)") from None
    return [os.path.join(ninja.BIN_DIR, "ninja")]


def run(folder: Path, jobs: int, targets: Iterable[str] = (), *, verbose: bool = False) -> None:
    """Runs ninja in `folder`; raises BuildError, after the compiler's own words, when a command fails."""
    command = [*find_ninja(), "-C", str(folder), "-j", str(jobs), *(["-v"] if verbose else []), *targets]
    sys.stdout.flush()
    if subprocess.run(command).returncode != 0:
        raise BuildError(f"a compiler failed; its words are above (to repeat: {' '.join(command)})")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the build folder: a second build in it waits, since ninja's own records bear one writer only."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"flash_attn: waiting for another build in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_if_changed(path: Path, text: str) -> None:
    """Leaves an up-to-date file alone, so that nothing that depends on it is rebuilt."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
