"""AMD: csrc/cuda hipified into the build folder, then hipcc. Hand-written AMD code (csrc/hip) is taken as it is."""

import importlib.util
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tools.build.backend import CXX_FLAGS, Backend, first_line
from tools.build.config import Config
from tools.build.errors import BuildError
from tools.build.instances import (
    Instance,
    InstanceFile,
    Machine,
    instance_files,
    instances,
    machines,
    registry_source,
)
from tools.build.ninja_file import Rule, Step, write_if_changed
from tools.build.rocm import choose_archs, compiler_path, runtime_flags, runtime_folders

# The table of kernels as a library of its own: the tests and the report read it; it needs neither torch nor a GPU.
TABLE_LIBRARY = Path("kernels.so")
TABLE_ACCESS = """
extern "C" __attribute__((visibility("default"))) const flash_attn::KernelTable* flash_attn_kernel_table(int index) {
  const flash_attn::KernelTables all = flash_attn::kernel_tables();
  return index < all.count ? all.tables[index] : nullptr;
}
"""


def hipify_engine(torch: Path) -> Path:
    """The folder of the hipify engine: the hipify_torch package where it is installed, else torch's own copy."""
    spec = importlib.util.find_spec("hipify_torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return torch / "utils/hipify"


class HipBackend(Backend):
    name = "hip"

    def __init__(self, config: Config):
        super().__init__(config)
        hipcc = compiler_path()
        if hipcc is None:
            raise BuildError("hipcc was not found (install ROCm or Debian's hipcc, put it on PATH, or set ROCM_HOME)")
        self.hipcc = hipcc
        machines(config, self.name, platform.machine())  # refuses names that nobody knows
        self.archs, self.archs_from = choose_archs(config.archs)
        self.machines = machines(replace(config, archs=self.archs), self.name, platform.machine())

    @property
    def hipified(self) -> Path:
        return self.config.folder / "hipified"

    def rules(self) -> dict[str, Rule]:
        hipcc = f"HIP_PLATFORM=amd {self.hipcc}"
        return {
            "hipcc": Rule(f"{hipcc} -MD -MF $out.d $flags -c $in -o $out", "hipcc $out", "$out.d"),
            "hip_link": Rule(f"{self.config.cxx} -shared $in -o $out $flags", "link $out"),
        }

    def flags(self, machine: Machine) -> tuple[str, ...]:
        shared = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
        return (*shared, f"--offload-arch={machine.name}", f"-I{self.hipified / 'csrc'}")

    def hipify(self) -> None:
        """Brings the translated sources up to date; does nothing when no source has changed."""
        script = Path(__file__).with_name("hipify.py")
        engine = hipify_engine(self.config.torch.folder)
        command = [sys.executable, str(script), str(self.config.root), str(self.hipified), str(engine)]
        if subprocess.run(command).returncode != 0:
            raise BuildError("csrc could not be hipified; the reasons are above")

    def steps(self) -> list[Step]:
        print(f"flash_attn: AMD code for {', '.join(self.archs)} (from {self.archs_from})")
        for note in self.notes():
            print(f"flash_attn: {note}")
        self.hipify()
        launch = self.hipified / "csrc/hip/launch.hip"
        return [
            Step("hipcc", (launch,), self.object_path("hip", launch), self.flags(self.machines[0])),
            *self.kernel_steps(),
        ]

    def kernel_steps(self) -> list[Step]:
        """One compiler call for each instance file."""
        steps = []
        for machine in self.machines:
            for file in instance_files(machine, self.config):
                source = self.generated / machine.name / f"{file.name}.hip"
                write_if_changed(source, hip_source(file))
                steps.append(Step("hipcc", (source,), self.object_path(machine.name, source), self.flags(machine)))
        return steps

    def table_steps(self, kernels: list[Step]) -> list[Step]:
        """The library of the kernels and their table alone."""
        source = self.generated / "kernel_table.cpp"
        write_if_changed(source, registry_source(self.tables()) + TABLE_ACCESS)
        output = Path("obj/kernel_table.o")
        return [
            Step("cxx", (source,), output, (*CXX_FLAGS, f"-I{self.csrc}")),
            Step("hip_link", (output, *(step.output for step in kernels)), TABLE_LIBRARY, self.link_flags()),
        ]

    def tables(self) -> dict[Machine, tuple[Instance, ...]]:
        return {machine: tuple(instances(machine, self.config)) for machine in self.machines}

    def link_flags(self) -> tuple[str, ...]:
        return runtime_flags(runtime_folders(self.hipcc, self.config.torch.lib))

    def notes(self) -> list[str]:
        """What is odd about this environment."""
        torch = self.config.torch
        if torch.flavour != "hip":
            return [
                f"torch {torch.version} is not for AMD GPUs: the library will load under it, and run on the CPU only"
            ]
        version = re.search(r"HIP version: (\d+)", first_line(self.hipcc, "--version"))
        if version and version[1] != torch.toolkit.split(".")[0]:
            return [f"hipcc is of HIP {version[1]}, torch {torch.version} of HIP {torch.toolkit}: use the same release"]
        return []

    def describe(self) -> dict[str, object]:
        compiler = first_line(self.hipcc, "--version")
        return {"archs": [machine.name for machine in self.machines], "compiler": compiler}


def hip_source(file: InstanceFile) -> str:
    """An instance file's text with the names that hipify gives its headers."""
    return file.text.replace('#include "cuda/', '#include "hip/')
