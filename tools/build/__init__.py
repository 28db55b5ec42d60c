"""Builds the shared library: `setup.py` and `make build` both call `build`.

One class a backend (cpu.py, cuda.py, hip.py) lists compiler calls, ninja runs them, instances.py says what is compiled.
"""

from collections.abc import Iterable
from pathlib import Path

from tools.build import info, ninja_file
from tools.build.backend import CXX_FLAGS, Backend
from tools.build.config import Config, from_environment
from tools.build.cpu import CpuBackend
from tools.build.cuda import CudaBackend
from tools.build.errors import BuildError
from tools.build.hip import HipBackend
from tools.build.instances import registry_source

__all__ = ["BuildError", "Config", "build", "from_environment", "install"]

LIBRARY = "_C.abi3.so"


def make_backends(config: Config) -> list[Backend]:
    """The host's, and the GPU's where one is asked for."""
    gpu: dict[str, type[Backend]] = {"cuda": CudaBackend, "hip": HipBackend}
    return [CpuBackend(config), *(gpu[name](config) for name in config.backends if name in gpu)]


def configure(config: Config) -> tuple[Path, dict[str, object]]:
    """Writes the generated sources and build.ninja; returns the library's path and what it will be."""
    backends = make_backends(config)
    steps = [step for backend in backends for step in backend.steps()]
    tables = {machine: rows for backend in backends for machine, rows in backend.tables().items()}
    about = info.build_info(config, backends)

    generated = config.folder / "gen"
    ninja_file.write_if_changed(generated / "kernels.cpp", registry_source(tables))
    ninja_file.write_if_changed(generated / "build_info.cpp", info.cpp_source(about))
    flags = (*CXX_FLAGS, f"-I{config.root / 'csrc'}")
    for name in ("kernels", "build_info"):
        output = Path("obj") / f"{name}.o"
        steps.append(ninja_file.Step("cxx", (generated / f"{name}.cpp",), output, flags))

    rules = {name: rule for backend in backends for name, rule in backend.rules().items()}
    # libtorch names torch's other libraries, those of a GPU among them: --no-as-needed keeps it in the list.
    rules["link"] = ninja_file.Rule(f"{config.cxx} -shared $in -o $out $flags", "link $out")
    library = Path(LIBRARY)
    link_flags = (*(flag for backend in backends for flag in backend.link_flags()), f"-L{config.torch.lib}")
    link_flags = (*link_flags, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    # Operators register themselves when the library is loaded: nothing needs to be visible, std:: templates included.
    exports = generated / "exports.map"
    ninja_file.write_if_changed(exports, "{ local: *; };\n")
    link_flags = (*link_flags, f"-Wl,--version-script={exports}")
    steps.append(ninja_file.Step("link", tuple(step.output for step in steps), library, link_flags))
    ninja_file.write_if_changed(config.folder / "build.ninja", ninja_file.render(rules, steps, library))
    return config.folder / library, about


def build(config: Config, targets: Iterable[str] = (), *, verbose: bool = False) -> tuple[Path, dict[str, object]]:
    """Compiles what is out of date, or of that only the ninja targets; returns the library's path and what it is."""
    print(f"flash_attn: building for {' and '.join(config.backends)} in {config.folder} with {config.jobs} jobs")
    with ninja_file.locked(config.folder):
        library, about = configure(config)
        ninja_file.run(config.folder, config.jobs, targets, verbose=verbose)
    return library, about


def install(library: Path, about: dict[str, object], package: Path) -> None:
    """Puts the library and its record into a package folder, replacing an older library that may be in use."""
    target = package / LIBRARY
    temporary = package / f".{LIBRARY}.new"
    package.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(library.read_bytes())
    temporary.chmod(0o755)
    temporary.replace(target)
    ninja_file.write_if_changed(package / "_build_info.py", info.python_source(about))
