"""The emulator over the kernels that `make hip` has compiled; skips where one of the two is missing."""

import os

import emulator as emu
import pytest

from tools.build.config import Config, from_environment
from tools.build.hip import TABLE_LIBRARY, compiler_path
from tools.build.hip_kernels import CompiledKernel, compile_kernels, compiled_kernels


@pytest.fixture(scope="session")
def config() -> Config:
    """That of `make hip`."""
    if compiler_path() is None:
        pytest.skip("hipcc was not found")
    return from_environment({**os.environ, "FLASH_ATTENTION_BACKEND": "hip", "FLASH_ATTENTION_ARCHS": "gfx90a;generic"})


@pytest.fixture(scope="session")
def kernels(config) -> list[CompiledKernel]:
    """Every kernel of the last `make hip`, brought up to date."""
    if not (config.folder / TABLE_LIBRARY).exists():
        pytest.skip("the AMD kernels have not been compiled (make hip)")
    return list(compiled_kernels(config, compile_kernels(config)))


@pytest.fixture(scope="session")
def emulator(kernels) -> emu.Emulator:
    if not emu.is_available():
        pytest.skip("the emulator for AMD's machine code is not here (../shared/tools/amdemu)")
    return emu.Emulator(kernels)
