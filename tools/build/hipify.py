"""`python tools/build/hipify.py ROOT OUT HIPIFY`: csrc for AMD, into OUT/csrc. Sources are never touched.

csrc/cuda goes through hipify and becomes OUT/csrc/hip; NVIDIA's own arch folders stay behind. What is not CUDA (core,
backend.h, the hand-written csrc/hip) is copied beside it. Files that come out as before keep their time stamps, so
ninja rebuilds only what changed, and nothing at all is done when neither a source nor the result has changed.

The engine keeps its results in module globals, so every run is a process of its own. HIPIFY is the engine's folder:
torch/utils/hipify, or hipify_torch where that is installed; it is loaded without importing torch.
"""

import contextlib
import hashlib
import importlib.util
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

EXTENSIONS = (".cu", ".cuh", ".h", ".cpp")
VERBATIM = ("core", "hip", "backend.h")
NVIDIA_ONLY = re.compile(r"sm\d+")
INCLUDE = re.compile(r'^(\s*#\s*include\s*")([^"]+)(")', re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# What the translation must not leave behind. compat.cuh asks which compiler it is: its conditions may.
LEFTOVER = re.compile(r"\b(?:cuda[A-Z]\w*|cu[A-Z]\w+|CUDA_\w+|__CUDA\w*|nv_bfloat16\w*|__nv_\w+|__shfl\w*_sync)\b")
CONDITION = re.compile(r"^\s*#[^\n]*", re.MULTILINE)


def source_files(csrc: Path) -> list[Path]:
    """What the AMD build sees of csrc, relative to it."""
    found = [path for path in csrc.rglob("*") if path.suffix in EXTENSIONS]
    relative = sorted(path.relative_to(csrc) for path in found)
    wanted = [path for path in relative if path.parts[0] == "cuda" or path.parts[0] in VERBATIM]
    return [path for path in wanted if not any(NVIDIA_ONLY.fullmatch(part) for part in path.parts)]


def digest(*paths: Path) -> str:
    """SHA-256 of files' names and contents."""
    state = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode() + content)
    return state.hexdigest()


def stamp_text(csrc: Path, files: list[Path], engine: Path, result: Path) -> str:
    """Digests of everything that the result depends on, and of the result."""
    made = sorted(path for path in result.rglob("*") if path.is_file())
    return f"{digest(*(csrc / file for file in files), *sorted(engine.glob('*.py')), Path(__file__))} {digest(*made)}"


def load_engine(folder: Path) -> ModuleType:
    """hipify_python of the package in `folder`."""
    package = importlib.util.spec_from_file_location(
        "hipify_engine", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert package is not None and package.loader is not None
    module = importlib.util.module_from_spec(package)
    sys.modules["hipify_engine"] = module
    package.loader.exec_module(module)
    return importlib.import_module("hipify_engine.hipify_python")


def translate(csrc: Path, files: list[Path], engine: ModuleType, scratch: Path) -> dict[Path, str]:
    """The translated tree, relative to csrc: csrc/cuda/x.cu becomes hip/x.hip."""
    staged, output = scratch / "staged", scratch / "output"  # the engine fills `output` only if it does not exist
    for file in files:
        if file.parts[0] == "cuda":
            (staged / "csrc" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(csrc / file, staged / "csrc" / file)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        engine.hipify(
            project_directory=str(staged),
            output_directory=str(output),
            includes=[str(staged / "csrc/*")],
            extensions=EXTENSIONS,
            is_pytorch_extension=True,
            hip_clang_launch=True,
            show_detailed=False,
        )
    made = [path for path in (output / "csrc/hip").rglob("*") if path.is_file()]
    result = {path.relative_to(output / "csrc"): path.read_text() for path in made}
    for file in files:
        if file.parts[0] in VERBATIM:
            result[file] = (csrc / file).read_text()
    return {path: INCLUDE.sub(lambda m: m[1] + hip_path(m[2]) + m[3], text) for path, text in result.items()}


def hip_path(include: str) -> str:
    """`../../cuda/compat.cuh` to `../../hip/compat.cuh`."""
    return re.sub(r"(^|/)cuda/", r"\1hip/", include)


def problems(tree: dict[Path, str], files: list[Path]) -> list[str]:
    """What is wrong with a translated tree: CUDA left over, includes that lead nowhere, files that got lost."""
    found = []
    for path, text in tree.items():
        code = COMMENT.sub("", text)
        if path.name == "compat.cuh":
            code = CONDITION.sub("", code)
        found += [f"{path}: {name} is CUDA's" for name in sorted(set(LEFTOVER.findall(code)))]
        for include in (match[2] for match in INCLUDE.finditer(text)):
            targets = [normalise(path.parent / include), normalise(Path(include))]
            if include != "hip/hip_runtime.h" and not any(target in tree for target in targets):
                found.append(f'{path}: #include "{include}" leads nowhere')
    for file in files:
        expected = Path("hip", *file.parts[1:]) if file.parts[0] == "cuda" else file
        expected = expected.with_suffix(".hip") if expected.suffix == ".cu" else expected
        if expected not in tree:
            found.append(f"{file}: nothing came of it")
    return found


def normalise(path: Path) -> Path:
    """Without `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts[-1:] = []
        else:
            parts.append(part)
    return Path(*parts)


def write_tree(tree: dict[Path, str], csrc: Path) -> None:
    """Makes csrc hold exactly `tree`, leaving files alone that are as they should be."""
    for old in [path for path in csrc.rglob("*") if path.is_file()]:
        if old.relative_to(csrc) not in tree:
            old.unlink()
    for path, text in tree.items():
        target = csrc / path
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


def run(root: Path, out: Path, engine: Path) -> bool:
    """Brings OUT up to date; returns whether anything was to do. Raises RuntimeError where the result is wrong."""
    csrc = root / "csrc"
    files = source_files(csrc)
    stamp, result = out / "digest", out / "csrc"
    if stamp.exists() and stamp.read_text() == stamp_text(csrc, files, engine, result):
        return False
    stamp.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = translate(csrc, files, load_engine(engine), Path(scratch))
    found = problems(tree, files)
    if found:
        raise RuntimeError("hipify left the sources in a wrong state:\n  " + "\n  ".join(found))
    write_tree(tree, result)
    stamp.write_text(stamp_text(csrc, files, engine, result))
    return True


def main() -> int:
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    root, out, engine = map(Path, sys.argv[1:])
    try:
        changed = run(root, out, engine)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"hipify: {'translated' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
