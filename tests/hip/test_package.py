"""The library of `make hip` as a user has it: beside the package, under a CPU torch, on a machine without a GPU.

Each test is a process of its own, since this one has the operators of another build.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.build import LIBRARY, info, install
from tools.build.code_objects import kernels

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build/native-hip"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> SimpleNamespace:
    """A folder to import the package from, with the library in it, and what the library is."""
    record = BUILT / "gen/build_info.cpp"
    if not (BUILT / LIBRARY).exists() or not record.exists():
        pytest.skip("the library for AMD has not been built (make hip)")
    literal = re.search(r"kBuildInfo = (.*);", record.read_text())
    assert literal is not None
    about = json.loads(ast.literal_eval(literal.group(1)))
    if about["source_digest"] != info.source_digest(ROOT):
        pytest.skip("the library for AMD is older than its sources (make hip)")
    folder = tmp_path_factory.mktemp("site")
    own = shutil.ignore_patterns("_C*.so", "_build_info.py", "__pycache__", ".*")
    shutil.copytree(ROOT / "flash_attn", folder / "flash_attn", ignore=own)
    install(BUILT / LIBRARY, about, folder / "flash_attn")
    return SimpleNamespace(folder=folder, about=about, library=folder / "flash_attn" / LIBRARY)


def run(package: SimpleNamespace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """python, importing that package and no other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_ATTENTION_")}
    command = [sys.executable, "-P", *arguments] if sys.version_info >= (3, 11) else [sys.executable, *arguments]
    environment = {**kept, "PYTHONPATH": str(package.folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package.folder)


def test_holds_the_kernels_it_says(package):
    """Machine code, and a host's table of the same length for each machine."""
    archs = package.about["archs"]["hip"]
    assert package.about["backends"] == ["cpu", "hip"] and archs
    assert len(kernels(package.library)) == sum(package.about["instances"][arch] for arch in archs)


def test_links_the_runtime_and_no_other(package):
    listing = subprocess.run(["readelf", "-dW", package.library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    assert any(name.startswith("libamdhip64") for name in needed), needed
    assert not any("cuda" in name or "nvidia" in name for name in needed), needed


def test_info(package):
    result = run(package, "-m", "flash_attn", "info")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^built for +hip: gfx90a.*, with HIP version", result.stdout, re.MULTILINE), result.stdout
    assert "none that torch can use (kernels for hip are built)" in result.stdout


# A tensor that says it is on the GPU, in a torch that knows none: the operators' own code for GPUs is called with it.
CALL_ON_A_DEVICE = """
import flash_attn, torch
from torch._subclasses.fake_tensor import FakeTensorMode

with open("/proc/self/maps") as file:
    assert "libamdhip64" in file.read()

on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
operators = torch.ops.flash_attn

def refused(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        raise SystemExit("was not refused")

with FakeTensorMode():
    q = torch.empty(1, 64, 2, 64, device="cuda")
    lse = torch.empty(1, 2, 64, device="cuda")
assert q.is_cuda
forward, backward = operators.forward.default.redispatch, operators.backward.default.redispatch
shared = (*(None,) * 6, 64, 64, 0.125, -1, -1, 0.0, 0.0)  # masks and numbers
refused(forward, on_gpu, q, q, q, *shared, 0, False, False, False)
refused(backward, on_gpu, q, None, q, q, q, q, lse, q, q, q, *shared, False, False)
refused(operators.describe, "cuda", 0)
refused(operators.key_block, "cuda", "bfloat16", 64)
"""


def test_every_call_on_a_device_says_that_there_is_none(package):
    if Path("/dev/kfd").exists():
        pytest.skip("this machine has an AMD GPU")
    result = run(package, "-c", CALL_ON_A_DEVICE)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert re.search(r"no HIP device is present: .+ \(this build's GPU kernels are for gfx90a\)", line), line


CPU_AGAINST_FLOAT64 = """
import torch, flash_attn
from flash_attn import flash_attn_func
from flash_attn.reference import attention_reference

torch.manual_seed(0)
for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
    q, k, v = (torch.randn(2, 65, heads, 64).to(dtype) for heads in (4, 2, 2))
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    ours = [tensor.requires_grad_() for tensor in (q, k, v)]
    wanted, got = attention_reference(*exact, causal=True).out, flash_attn_func(*ours, causal=True)
    weights = torch.randn_like(wanted)
    wanted.backward(weights)
    got.backward(weights.to(dtype))
    pairs = [(got, wanted), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    errors = [float((a.double() - b).abs().max()) for a, b in pairs]
    assert max(errors) < bound, (dtype, errors)
    print(dtype, errors)
"""


def test_the_cpu_works_beside_it(package):
    """Bounds: a few units in the last place of the largest element, which is about 8."""
    result = run(package, "-c", CPU_AGAINST_FLOAT64)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 3, result.stdout + result.stderr
