"""The same tests on MI300's machine code. Debian's hipcc does not know that machine; clang 17 and later do."""

import emulator as emu
import pytest
from emulator import amdemu
from test_guarantees import (  # noqa: F401
    attend,
    differentiate,
    test_runs_and_batches_do_not_matter,
    test_schedules_do_not_matter,
)
from test_kernels import test_dropout, test_features, test_head_dims, test_lengths, test_packed  # noqa: F401
from test_performance_kernels import run  # noqa: F401
from test_performance_kernels import test_head_dims as test_performance_head_dims  # noqa: F401

from tools.build.config import ROOT
from tools.build.hip import hip_source
from tools.build.hip_kernels import CompiledKernel
from tools.build.instances import MACHINES, InstanceFile, instance_files

MACHINE = next(machine for machine in MACHINES if machine.name == "gfx942")
FLAGS = ("-std=c++17", "-ffp-contract=off", f"-I{ROOT / 'build/native-hip/hipified/csrc'}")


class Gfx942Emulator(emu.Emulator):
    """Compiles what a test asks for. What the host knows of a kernel is the same on either machine."""

    def __init__(self, kernels: list[CompiledKernel], folder, config):
        super().__init__(kernels)
        self.folder = folder
        self.files = {one.name: file for file in instance_files(MACHINE, config) for one in file.instances}

    def code(self, kernel: CompiledKernel):
        file: InstanceFile = self.files[kernel.instance.name]
        source, output = (self.folder / f"{file.name}{suffix}" for suffix in (".hip", ".hsaco"))
        if not output.exists():
            source.write_text(hip_source(file))
            amdemu().compile_hip(source, output, MACHINE.name, FLAGS)
        return amdemu().codeobject.load(str(output), None, self.symbol(kernel))

    def symbol(self, kernel: CompiledKernel) -> str:
        return kernel.resources.name.replace("6Gfx90a", "6Gfx942")


@pytest.fixture(scope="module")
def emulator(kernels, config, tmp_path_factory) -> Gfx942Emulator:
    if not emu.is_available():
        pytest.skip("the emulator for AMD's machine code is not here (../shared/tools/amdemu)")
    if amdemu().compile.newer_clang() is None:
        pytest.skip("no compiler for gfx942 (apt-get install clang-19 lld-19)")
    return Gfx942Emulator(kernels, tmp_path_factory.mktemp("gfx942"), config)


def test_holds_gfx942_code(emulator, kernels):
    """And not the code of the other machine."""
    assert {emulator.code(kernel).arch for kernel in kernels[:3]} == {MACHINE.name}
