"""NVIDIA: nvcc over the templates as they are."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tools.build.backend import Backend, first_line
from tools.build.config import Config
from tools.build.errors import BuildError
from tools.build.instances import (
    CUDA_ARCH,
    Instance,
    Machine,
    instance_files,
    instances,
    machines,
    write_instance_files,
)
from tools.build.ninja_file import Rule, Step

# Machine code for Ampere and Hopper, and PTX for whatever comes between and after.
DEFAULT_ARCHS = ("80", "90")
HOPPER = ("90", "90a")  # built as the sm90 machine, whose instructions only sm_90a has

NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",  # a * b + c rounds twice, fma() once: docs/numerics.md
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
    "-Xfatbin=-compress-all",
)


def compiler_path(environment: Mapping[str, str] = os.environ) -> str | None:
    """nvcc: under CUDA_HOME, on PATH, or in the usual place."""
    if environment.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{environment['CUDA_HOME']}/bin")
    return shutil.which("nvcc", path=environment.get("PATH")) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit_folder(nvcc: str) -> Path:
    """The toolkit that this nvcc, which may be a wrapper, belongs to."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-c"], capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parents[1]


def cuda_archs(config: Config) -> tuple[str, ...]:
    """`80`, `90` ...: from FLASH_ATTENTION_ARCHS (which may also name levels of the host)."""
    matches = (CUDA_ARCH.fullmatch(arch) for arch in config.archs)
    asked = tuple("".join(match.groups()) for match in matches if match)
    for arch in asked:
        if int(arch.rstrip("a")) < 80:
            raise BuildError(f"FLASH_ATTENTION_ARCHS: CUDA's must be 80 or later, got {arch}")
    return asked or DEFAULT_ARCHS


class CudaBackend(Backend):
    name = "cuda"

    def __init__(self, config: Config):
        super().__init__(config)
        nvcc = compiler_path()
        if nvcc is None:
            raise BuildError("nvcc was not found (install the CUDA toolkit, put it on PATH, or set CUDA_HOME)")
        self.nvcc = nvcc
        self.archs = cuda_archs(config)
        wanted = {"sm90" if arch in HOPPER else "sm80" for arch in self.archs}
        self.machines = tuple(m for m in machines(config, "cuda", platform.machine()) if m.name in wanted)

    def rules(self) -> dict[str, Rule]:
        command = f"{self.nvcc} -ccbin {self.config.cxx} -MD -MF $out.d $flags -c $in -o $out"
        return {"nvcc": Rule(command, "nvcc $out", "$out.d")}

    def codes(self, machine: Machine) -> tuple[str, ...]:
        """What nvcc compiles a machine's kernels for; the lowest but Hopper's also as PTX."""
        if machine.name == "sm90":
            return ("-gencode=arch=compute_90a,code=sm_90a",)
        archs = [arch for arch in self.archs if arch not in HOPPER]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        return (*codes, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}")

    def flags(self, machine: Machine) -> tuple[str, ...]:
        return (*NVCC_FLAGS, *self.codes(machine), f"-I{self.csrc}")

    def steps(self) -> list[Step]:
        launch = self.csrc / "cuda/launch.cu"
        steps = [Step("nvcc", (launch,), self.object_path("cuda", launch), self.flags(self.machines[0]))]
        for machine in self.machines:
            files = instance_files(machine, self.config)
            for path in write_instance_files(files, self.generated, ".cu"):
                steps.append(Step("nvcc", (path,), self.object_path(machine.name, path), self.flags(machine)))
        return steps

    def tables(self) -> dict[Machine, tuple[Instance, ...]]:
        return {machine: tuple(instances(machine, self.config)) for machine in self.machines}

    def link_flags(self) -> tuple[str, ...]:
        # The static runtime: it shares the driver's context and streams with torch's, whatever version that is.
        folder = toolkit_folder(self.nvcc)
        libraries = next((path for path in (folder / "lib64", folder / "lib") if path.exists()), folder / "lib64")
        return (f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt")

    def describe(self) -> dict[str, object]:
        version = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release [\d.]+, V([\d.]+)", version)
        compiler = f"nvcc {match.group(1)}" if match else first_line(self.nvcc, "--version")
        return {"archs": [f"sm_{'90a' if arch in HOPPER else arch}" for arch in self.archs], "compiler": compiler}
