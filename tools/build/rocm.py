"""What of ROCm is in this environment: its programs, the GPUs to compile for, the runtime to link."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.build.backend import first_line
from tools.build.errors import BuildError
from tools.build.instances import MACHINES

# What is built where nothing says which GPU: MI200, which the AMD kernels are made for.
DEFAULT_ARCH = "gfx90a"

ARCH = re.compile(r"\bgfx[0-9a-f]{3,}\b")
HOST_ARCH = "gfx000"  # what the enumerators call the processor


def rocm_program(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """A program of ROCm's: under ROCM_HOME, where that is set; else under ROCM_PATH, on PATH, or in the usual place."""
    if environment.get("ROCM_HOME"):
        return shutil.which(name, path=f"{environment['ROCM_HOME']}/bin")
    usual = [f"{environment.get('ROCM_PATH') or '/opt/rocm'}/bin", environment.get("PATH", os.defpath), "/opt/rocm/bin"]
    return shutil.which(name, path=os.pathsep.join(usual))


def compiler_path(environment: Mapping[str, str] = os.environ) -> str | None:
    """hipcc."""
    return rocm_program("hipcc", environment)


def gpus_present(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """`("gfx90a",)`: the kinds of GPU in this machine, as ROCm's programs list them; empty where there is none."""
    for name in ("rocm_agent_enumerator", "rocminfo"):
        program = rocm_program(name, environment)
        if program is None:
            continue
        try:
            listing = subprocess.run([program], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found = dict.fromkeys(ARCH.findall(listing.stdout)) if listing.returncode == 0 else {}
        found.pop(HOST_ARCH, None)
        if found:
            return tuple(found)
    return ()


def choose_archs(asked: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> tuple[tuple[str, ...], str]:
    """What to compile for, and who says so. A container is built where there is no GPU, so that must do.

    `asked` is FLASH_ATTENTION_ARCHS, which may name levels of the host only. Then comes PYTORCH_ROCM_ARCH, which ROCm's
    images set to all that their torch is for; then the GPUs that are there; then MI200. Raises BuildError where there
    are no kernels for what was found.
    """
    known = [machine.name for machine in MACHINES if machine.backend == "hip"]
    if any(arch in known for arch in asked):
        return tuple(arch for arch in asked if arch in known), "FLASH_ATTENTION_ARCHS"
    sources = (
        ("PYTORCH_ROCM_ARCH", lambda: tuple(dict.fromkeys(ARCH.findall(environment.get("PYTORCH_ROCM_ARCH", ""))))),
        ("the GPUs here", lambda: gpus_present(environment)),
    )
    for source, find in sources:
        found = find()
        if found and not any(arch in known for arch in found):
            raise BuildError(
                f"{source}: {', '.join(found)}, but there are kernels for {', '.join(known)} (set "
                f"FLASH_ATTENTION_ARCHS to build for another machine, or FLASH_ATTENTION_BACKEND=cpu for none)"
            )
        if found:
            return tuple(arch for arch in found if arch in known), source
    return (DEFAULT_ARCH,), "the default"


def runtime_folders(hipcc: str, torch: Path) -> Iterator[Path]:
    """Where libamdhip64 may be, best first; `torch` is the package's lib folder.

    Where torch brings a copy it must be that one: a stream means something to the copy alone that made it.
    """
    yield torch
    yield Path(hipcc).resolve().parents[1] / "lib"
    configuration = rocm_program("hipconfig")
    if configuration is not None:
        for option in ("--rocmpath", "--path"):
            yield Path(first_line(configuration, option) or "/nowhere") / "lib"
    yield Path("/opt/rocm/lib")


def runtime_flags(folders: Iterator[Path]) -> tuple[str, ...]:
    """Links the first libamdhip64 found; by its name, since a copy inside torch's wheel need not be called .so."""
    for folder in folders:
        found = sorted(folder.glob("libamdhip64*.so*"), key=lambda path: (len(path.name), path.name))
        if found:
            return (f"-L{folder}", f"-l:{found[0].name}")
    return ("-lamdhip64",)
