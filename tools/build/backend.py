"""What the build wants of a backend: its rules, its compiler calls, its share of the link."""

import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from tools.build.config import Config
from tools.build.instances import Instance, Machine
from tools.build.ninja_file import Rule, Step

# a * b + c rounds twice everywhere and fma() once, whatever the compiler: docs/numerics.md.
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")


class Backend(ABC):
    """One kind of machine. Knows its compiler, flags and sources; ninja runs what it lists."""

    name: str

    def __init__(self, config: Config):
        self.config = config

    @property
    def csrc(self) -> Path:
        return self.config.root / "csrc"

    @property
    def generated(self) -> Path:
        return self.config.folder / "gen"

    def object_path(self, group: str, source: Path) -> Path:
        """Relative to the build folder, where ninja works: short lines, and a tree that may move."""
        return Path("obj") / group / (source.name + ".o")

    @abstractmethod
    def rules(self) -> dict[str, Rule]:
        """The ninja rules that steps() uses."""

    @abstractmethod
    def steps(self) -> list[Step]:
        """Writes what has to be generated and returns the compiler calls. Each output is linked."""

    @abstractmethod
    def tables(self) -> dict[Machine, tuple[Instance, ...]]:
        """What those calls compile, by machine."""

    def link_flags(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """For build_info: archs and compiler."""


def first_line(*command: str) -> str:
    """The first line a program prints, for the record; empty where it does not run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""
