"""Finds the torch to build against, without importing it and without needing it in pip's isolated environment.

With build isolation pip runs the build in the target environment's own interpreter but hides its packages;
`sysconfig` still names the folders they are in, and headers and link libraries are all a build needs.
"""

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.build.errors import BuildError

MINIMUM = (2, 10)


@dataclass(frozen=True)
class TorchPackage:
    """An installed torch, as its version.py describes it."""

    folder: Path
    version: str  # "2.13.0+cpu"
    flavour: str  # "cpu", "cuda" or "hip"
    toolkit: str  # the CUDA or HIP version it was built with, or ""

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def lib(self) -> Path:
        return self.folder / "lib"


def candidate_folders(environment: Mapping[str, str]) -> Iterator[Path]:
    """Folders where the torch package may be, best first."""
    if environment.get("FLASH_ATTENTION_TORCH"):
        yield Path(environment["FLASH_ATTENTION_TORCH"])
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    schemes = [name for name in sysconfig.get_scheme_names() if not name.startswith(("nt", "osx", "posix_home"))]
    for prefix in (sys.prefix, sys.base_prefix):  # a virtual environment, then what it is made from
        for scheme in schemes:
            paths = sysconfig.get_paths(scheme, vars={"base": prefix, "platbase": prefix})
            yield from (Path(paths[key]) / "torch" for key in ("purelib", "platlib"))
    yield Path(site.getusersitepackages()) / "torch"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):  # tools that build in an interpreter of their own
        if environment.get(variable):
            yield from Path(environment[variable]).glob("lib/python3*/site-packages/torch")


def read_torch(folder: Path) -> TorchPackage:
    """Reads torch/version.py: assignments of a string or None."""
    text = (folder / "version.py").read_text()

    def value(name: str) -> str:
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
        return match.group(1) if match else ""

    cuda, hip = value("cuda"), value("hip")
    return TorchPackage(folder, value("__version__"), "hip" if hip else "cuda" if cuda else "cpu", hip or cuda)


def find_torch(environment: Mapping[str, str] = os.environ) -> TorchPackage:
    """The environment's torch; raises BuildError where there is none, or one too old."""
    tried: list[str] = []
    for folder in candidate_folders(environment):
        if not (folder / "version.py").exists() or not (folder / "include/torch/csrc/stable/library.h").exists():
            tried.append(str(folder))
            continue
        torch = read_torch(folder)
        version = tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2])
        if version < MINIMUM:
            raise BuildError(f"torch must be at least 2.10, got {torch.version} in {folder} (pip install -U torch)")
        return torch
    raise BuildError(
        "torch's headers were not found (pip install torch first, into the environment that flash_attn goes to; "
        "or set FLASH_ATTENTION_TORCH to the torch package's folder); looked in " + ", ".join(dict.fromkeys(tried))
    )
