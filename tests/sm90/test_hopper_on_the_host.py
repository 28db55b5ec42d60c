"""Hopper's backwards and fp32 forward on the CPU: their sources, threads as fibres in random order, PTX replaced.

No substitute for a GPU: multiplies are done when they are issued, lanes of a warp drift apart, and memory is in order.
What it finds are values from the wrong place or of nobody (shared memory and neighbours are NaN), barriers that count
wrong, and schedules in which nobody gets on.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """A folder with those of backward.cpp and forward_fp32.cpp."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("sm90")
    shutil.copytree(CSRC / "core", folder / "core")
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    shutil.copytree(HERE / "overlay", folder / "cuda", dirs_exist_ok=True)
    for name in ("backward", "forward_fp32"):
        command = [compiler, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", f"-I{folder}"]
        command += [f"-I{HERE}", "-include", "host.h", str(HERE / f"{name}.cpp"), "-o", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def run(program: Path, *arguments: object, problems: int) -> None:
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count("good") == problems


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "kind, dim",
    [(kind, dim) for kind in ("16-bit", "fp32") for dim in (64, 96, 128, 192, 256)],
)
def test_backward_is_that_of_the_definition(programs, kind, dim, seed):
    run(programs / "backward", kind, dim, seed, problems=16 if kind == "16-bit" else 14)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_fp32_forward_is_that_of_the_definition(programs, dim, seed):
    run(programs / "forward_fp32", dim, seed, problems=16 if dim <= 128 else 14)  # wide ones fold no chunks
