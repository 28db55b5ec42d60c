"""hipify: what comes of csrc, that the sources stay as they are, and that nothing is done twice.

The engine keeps state, so each run is a process, as in the build.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.build import hipify
from tools.build.hip import hipify_engine
from tools.build.torch_package import find_torch

ROOT = Path(__file__).resolve().parents[2]


def run(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    engine = hipify_engine(find_torch().folder)
    command = [sys.executable, ROOT / "tools/build/hipify.py", root, out, engine]
    return subprocess.run(command, capture_output=True, text=True)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Of every file below: when it was written, and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def translated(tmp_path_factory) -> Path:
    """csrc for AMD, freshly made; the sources were not touched in making it."""
    out = tmp_path_factory.mktemp("hipify") / "out"
    before = state(ROOT / "csrc")
    result = run(ROOT, out)
    assert result.returncode == 0 and "translated" in result.stdout, result.stdout + result.stderr
    assert state(ROOT / "csrc") == before
    return out


@pytest.fixture
def small(tmp_path) -> Path:
    """A project that is quick to translate."""
    texts = {
        "core/params.h": "#pragma once\nstruct Params {};\n",
        "backend.h": '#pragma once\n#include "core/params.h"\n',
        "cuda/tile/tile.cuh": "#pragma once\n__device__ inline int lane() { return threadIdx.x % warpSize; }\n",
        "cuda/sm80/arch.cuh": "#pragma once\n#include <cuda_fp16.h>\n",
        "cuda/launch.cu": '#include <cuda_runtime.h>\n#include "../backend.h"\n#include "tile/tile.cuh"\n'
        "bool stop() { return cudaDeviceSynchronize() == cudaSuccess; }\n",
        "hip/gfx90a/arch.cuh": '#pragma once\n#include "../../cuda/tile/tile.cuh"\n',
    }
    for name, text in texts.items():
        (tmp_path / "root/csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root/csrc" / name).write_text(text)
    return tmp_path / "root"


class TestResult:
    def test_every_file_has_its_counterpart(self, translated):
        """csrc/cuda/x.cu becomes hip/x.hip; what is NVIDIA's own, or the host's, stays behind."""
        csrc = ROOT / "csrc"
        sources = [path.relative_to(csrc) for path in csrc.rglob("*") if path.is_file()]
        wanted = {path.as_posix() for path in sources if path.parts[0] in ("core", "hip", "backend.h")}
        own = [path for path in sources if path.parts[0] == "cuda" and not re.fullmatch(r"sm\d+", path.parts[1])]
        wanted |= {re.sub(r"\.cu$", ".hip", Path("hip", *path.parts[1:]).as_posix()) for path in own}
        made = {path.relative_to(translated / "csrc").as_posix() for path in (translated / "csrc").rglob("*.*")}
        assert made == wanted and {"hip/launch.hip", "hip/kernels/forward.cuh", "hip/gfx90a/arch.cuh"} <= made

    def test_no_cuda_identifier_is_left(self, translated):
        """Nor is any outside comments and conditions; found by other means than hipify.py's own."""
        for path in (translated / "csrc").rglob("*.*"):
            code = re.sub(r"//[^\n]*", "", path.read_text())
            code = re.sub(r"^\s*#\s*(?:if|elif|ifdef|ifndef)\b[^\n]*", "", code, flags=re.MULTILINE)
            words = set(re.findall(r"[A-Za-z_]\w*", code))
            left = {word for word in words if re.match(r"cuda|cu[A-Z]|_*nv_|__CUDA|CUDA_", word) or "_sync" in word}
            assert not left - {"cuda", "__syncthreads"}, path

    def test_names_are_hip_s(self, translated):
        launch = (translated / "csrc/hip/launch.hip").read_text()
        source = (ROOT / "csrc/cuda/launch.cu").read_text()
        for name in set(re.findall(r"\bcuda([A-Z]\w+)\(", source)):
            assert re.search(rf"\bhip(?:Ext)?{name}\(", launch), name
        assert "#include <hip/hip_runtime.h>" in launch and "cuda_runtime" not in launch

    def test_includes_lead_somewhere(self, translated):
        """Quoted ones to files of the tree, none of them back to csrc/cuda."""
        csrc = translated / "csrc"
        for path in csrc.rglob("*.*"):
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
                found = (path.parent / name).is_file() or (csrc / name).is_file()
                assert found or name == "hip/hip_runtime.h", f"{path}: {name}"
                assert not re.search(r"(^|/)cuda/", name), f"{path}: {name}"

    def test_what_is_not_cuda_is_copied(self, translated):
        for name in ("backend.h", "core/params.h"):
            assert (translated / "csrc" / name).read_bytes() == (ROOT / "csrc" / name).read_bytes()


class TestAgain:
    def test_nothing_is_done_when_nothing_changed(self, small, tmp_path):
        out = tmp_path / "out"
        assert "translated" in run(small, out).stdout
        before = state(out)
        again = run(small, out)
        assert again.returncode == 0 and "up to date" in again.stdout
        assert state(out) == before

    def test_a_change_rewrites_what_it_changes(self, small, tmp_path):
        """The rest keeps its time stamps, so ninja compiles no more than it must."""
        out = tmp_path / "out"
        run(small, out)
        before = state(out / "csrc")
        (small / "csrc/cuda/tile/tile.cuh").write_text("#pragma once\n__device__ inline int lane() { return 0; }\n")
        assert "translated" in run(small, out).stdout
        after = state(out / "csrc")
        assert {name for name in after if after[name] != before[name]} == {"hip/tile/tile.cuh"}

    def test_a_removed_file_goes(self, small, tmp_path):
        out = tmp_path / "out"
        (small / "csrc/cuda/tile/more.cuh").write_text("#pragma once\n")
        run(small, out)
        assert (out / "csrc/hip/tile/more.cuh").exists()
        (small / "csrc/cuda/tile/more.cuh").unlink()
        run(small, out)
        assert not (out / "csrc/hip/tile/more.cuh").exists() and (out / "csrc/hip/tile/tile.cuh").exists()

    def test_nothing_is_written_beside_the_sources(self, small, tmp_path):
        before = state(small)
        assert run(small, tmp_path / "out").returncode == 0
        assert state(small) == before

    def test_a_damaged_result_is_made_whole(self, small, tmp_path):
        out = tmp_path / "out"
        run(small, out)
        good = state(out / "csrc")
        (out / "csrc/hip/launch.hip").write_text("")
        (out / "csrc/core/params.h").unlink()
        assert "translated" in run(small, out).stdout
        assert {name: text for name, (_, text) in state(out / "csrc").items()} == {k: t for k, (_, t) in good.items()}


class TestRefusal:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("__device__ int f(int x) { return __shfl_xor_sync(~0u, x, 1); }\n", "__shfl_xor_sync is CUDA's"),
            ("int f() { return __CUDA_ARCH__; }\n", "__CUDA_ARCH__ is CUDA's"),
            ('#include "missing.cuh"\n', "leads nowhere"),
        ],
    )
    def test_what_hipify_does_not_translate(self, small, tmp_path, text, complaint):
        """An error that says where, and no tree that a compiler would take."""
        (small / "csrc/cuda/tile/bad.cuh").write_text(text)
        result = run(small, tmp_path / "out")
        assert result.returncode == 1 and complaint in result.stderr and "hip/tile/bad.cuh" in result.stderr
        assert not (tmp_path / "out/digest").exists()

    def test_a_lost_file_is_seen(self):
        files = [Path("cuda/a.cu"), Path("core/b.h")]
        found = hipify.problems({Path("hip/a.hip"): ""}, files)
        assert found == ["core/b.h: nothing came of it"]
