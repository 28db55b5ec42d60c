"""The kernels for NVIDIA on the CPU: their sources, threads as fibres, warps and copies in random order, PTX replaced.

No substitute for a GPU: multiplies are done when they are issued, and memory is in order.
What it finds are values from the wrong place or of nobody (shared memory and neighbours are NaN), barriers that count
wrong, and schedules in which nobody gets on.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PROGRAMS = [f"{kernel}_{loops}" for loops in ("sm80", "sm90") for kernel in ("forward", "backward")]


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """A folder with those of PROGRAMS."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("nvidia")
    shutil.copytree(CSRC / "core", folder / "core")
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    shutil.copytree(HERE / "overlay", folder / "cuda", dirs_exist_ok=True)
    command = [compiler, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", f"-I{folder}"]
    command += [f"-I{HERE}", "-include", "host.h"]
    compilations = [
        subprocess.Popen([*command, str(HERE / f"{name}.cpp"), "-o", str(folder / name)], stderr=subprocess.PIPE)
        for name in PROGRAMS
    ]
    for compilation in compilations:
        errors = compilation.communicate()[1]
        assert compilation.returncode == 0, errors.decode()[-4000:]
    return folder


def run(program: Path, *arguments: object, problems: int) -> None:
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count("good") == problems


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", ["16-bit", "fp32"])
class TestSharedLoopsAreTheDefinition:
    def test_forward(self, programs, kind, dim):
        run(programs / "forward_sm80", kind, dim, 1, problems=22)

    def test_backward(self, programs, kind, dim):
        run(programs / "backward_sm80", kind, dim, 1, problems=14)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", ["16-bit", "fp32"])
class TestHoppersLoopsAreTheDefinition:
    def test_forward(self, programs, kind, dim, seed):
        of_fp32 = 16 if dim <= 128 else 14  # wide ones fold no chunks
        run(programs / "forward_sm90", kind, dim, seed, problems=48 if kind == "16-bit" else of_fp32)

    def test_backward(self, programs, kind, dim, seed):
        run(programs / "backward_sm90", kind, dim, seed, problems=16 if kind == "16-bit" else 14)
