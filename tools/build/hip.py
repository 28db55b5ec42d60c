"""AMD: csrc/cuda hipified into the build folder, then hipcc. Hand-written AMD code (csrc/hip) is taken as it is."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tools.build.backend import Backend, first_line
from tools.build.config import Config
from tools.build.errors import BuildError
from tools.build.instances import Instance, Machine, instance_files, instances, machines, write_instance_files
from tools.build.ninja_file import Rule, Step


def compiler_path(environment: Mapping[str, str] = os.environ) -> str | None:
    """hipcc: under ROCM_HOME, on PATH, or in the usual place."""
    if environment.get("ROCM_HOME"):
        return shutil.which("hipcc", path=f"{environment['ROCM_HOME']}/bin")
    return shutil.which("hipcc", path=environment.get("PATH")) or shutil.which("hipcc", path="/opt/rocm/bin")


class HipBackend(Backend):
    name = "hip"

    def __init__(self, config: Config):
        super().__init__(config)
        hipcc = compiler_path()
        if hipcc is None:
            raise BuildError("hipcc was not found (install ROCm or Debian's hipcc, put it on PATH, or set ROCM_HOME)")
        self.hipcc = hipcc
        self.machines = machines(config, "hip", platform.machine())

    @property
    def hipified(self) -> Path:
        return self.config.folder / "hipified"

    def rules(self) -> dict[str, Rule]:
        command = f"HIP_PLATFORM=amd {self.hipcc} -MD -MF $out.d $flags -c $in -o $out"
        return {"hipcc": Rule(command, "hipcc $out", "$out.d")}

    def flags(self, machine: Machine) -> tuple[str, ...]:
        shared = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
        return (*shared, f"--offload-arch={machine.name}", *self.defines(), f"-I{self.hipified / 'csrc'}")

    def steps(self) -> list[Step]:
        script = Path(__file__).with_name("hipify.py")
        subprocess.run([sys.executable, str(script), str(self.config.root), str(self.hipified)], check=True)
        launch = self.hipified / "csrc/hip/launch.hip"
        steps = [Step("hipcc", (launch,), self.object_path("hip", launch), self.flags(self.machines[0]))]
        for machine in self.machines:
            files = instance_files(machine, self.config)
            for path in write_instance_files(files, self.generated, ".hip"):
                steps.append(Step("hipcc", (path,), self.object_path(machine.name, path), self.flags(machine)))
        return steps

    def tables(self) -> dict[Machine, tuple[Instance, ...]]:
        return {machine: tuple(instances(machine, self.config)) for machine in self.machines}

    def describe(self) -> dict[str, object]:
        compiler = first_line(self.hipcc, "--version")
        return {"archs": [machine.name for machine in self.machines], "compiler": compiler}
