"""What to build, as the environment asks for it.

| variable                           | meaning                                                                        |
| ---------------------------------- | ------------------------------------------------------------------------------ |
| `FLASH_ATTENTION_BACKEND`          | `auto` (what the installed torch is), `cpu`, `cuda`, `hip`; cpu is always in   |
| `FLASH_ATTENTION_ARCHS`            | machine codes, `;` between them: `80;90`, `gfx90a`, `x86-64-v3`                |
| `PYTORCH_ROCM_ARCH`                | for hip, where the above names none: those of its GPUs that have kernels       |
| `FLASH_ATTENTION_INSTANCES`        | a subset for quick builds: `bf16:64,128;fp32:64`                               |
| `FLASH_ATTENTION_INTERNAL_USE_RTZ` | `1` (default) builds the performance mode's kernels, `0` leaves them out       |
| `FLASH_ATTENTION_TORCH`            | the folder of the torch package whose headers to use                           |
| `MAX_JOBS`, `CXX`                  | compiler processes at once; the host's compiler                                |
| `CUDA_HOME`, `ROCM_HOME`           | toolkits, where they are not on PATH or in the usual place                     |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.build.errors import BuildError
from tools.build.torch_package import TorchPackage, find_torch

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("cpu", "cuda", "hip")
DTYPES = ("fp16", "bf16", "fp32", "fp64")


@dataclass(frozen=True)
class Config:
    """One build: everything that decides its outcome, apart from the sources."""

    backend: str  # "cpu", or "cuda" or "hip" beside it
    torch: TorchPackage
    archs: tuple[str, ...] = ()  # empty: the backend's default
    subset: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # dtype -> head dims; empty: all
    use_rtz: bool = True  # the performance mode's kernels, which round toward zero
    jobs: int = 1
    cxx: str = "c++"
    root: Path = ROOT

    @property
    def folder(self) -> Path:
        """Where ninja works: one folder a backend, so that switching rebuilds nothing."""
        return self.root / "build" / f"native-{self.backend}"

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cpu",) if self.backend == "cpu" else ("cpu", self.backend)

    def wants(self, dtype: str, head_dim: int) -> bool:
        """Is this instance inside the requested subset? head_dim 0: a kernel that does not depend on it."""
        return not self.subset or (dtype in self.subset and (head_dim == 0 or head_dim in self.subset[dtype]))


def parse_subset(text: str) -> dict[str, tuple[int, ...]]:
    """`"bf16:64,128;fp32:64"` to `{"bf16": (64, 128), "fp32": (64,)}`."""
    subset: dict[str, tuple[int, ...]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        dtype, colon, sizes = part.partition(":")
        if dtype not in DTYPES or not colon or not all(size.strip().isdigit() for size in sizes.split(",")):
            raise BuildError(
                f"FLASH_ATTENTION_INSTANCES: parts must look like bf16:64,128 with a dtype of {', '.join(DTYPES)}, "
                f"got {part!r} (separate parts with ;)"
            )
        subset[dtype] = tuple(int(size) for size in sizes.split(","))
    return subset


def default_jobs(gigabytes_per_job: float = 3.0) -> int:
    """Compiler processes that this machine's cores and memory carry, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(cores, int(memory / gigabytes_per_job), 16))


def from_environment(environment: Mapping[str, str] = os.environ) -> Config:
    """Reads the variables above; raises BuildError where they make no sense or something needed is missing."""
    backend = environment.get("FLASH_ATTENTION_BACKEND", "auto")
    if backend not in ("auto", *BACKENDS):
        raise BuildError(f"FLASH_ATTENTION_BACKEND: must be auto, cpu, cuda or hip, got {backend!r}")
    torch = find_torch(environment)
    if backend == "auto":
        backend = choose_backend(torch, environment)
    rtz = environment.get("FLASH_ATTENTION_INTERNAL_USE_RTZ", "1")
    if rtz not in ("0", "1"):
        raise BuildError(f"FLASH_ATTENTION_INTERNAL_USE_RTZ: must be 0 or 1, got {rtz!r}")
    jobs = environment.get("MAX_JOBS", "") or str(default_jobs())
    if not jobs.isdigit() or int(jobs) < 1:
        raise BuildError(f"MAX_JOBS: must be a positive number, got {jobs!r}")
    return Config(
        backend=backend,
        torch=torch,
        archs=tuple(arch for arch in environment.get("FLASH_ATTENTION_ARCHS", "").replace(",", ";").split(";") if arch),
        subset=parse_subset(environment.get("FLASH_ATTENTION_INSTANCES", "")),
        use_rtz=rtz == "1",
        jobs=int(jobs),
        cxx=environment.get("CXX", "c++"),
    )


def choose_backend(torch: TorchPackage, environment: Mapping[str, str]) -> str:
    """What the installed torch is, where its compiler is there; says so where it is not."""
    from tools.build import cuda, hip  # they import this module

    if torch.flavour == "cpu":
        return "cpu"
    backend = {"cuda": cuda, "hip": hip}[torch.flavour]
    if backend.compiler_path(environment) is not None:
        return torch.flavour
    name = {"cuda": "nvcc", "hip": "hipcc"}[torch.flavour]
    if gpu_is_present(torch.flavour):
        raise BuildError(
            f"this torch ({torch.version}) and this machine have a GPU, but {name} was not found (install the GPU's "
            f"toolkit, or set FLASH_ATTENTION_BACKEND=cpu for a build without it)"
        )
    print(f"flash_attn: torch {torch.version} is for GPUs, but there is neither one nor {name} here: building for cpu")
    return "cpu"


def gpu_is_present(flavour: str) -> bool:
    """Has the kernel's driver made a device node?"""
    return Path("/dev/kfd" if flavour == "hip" else "/dev/nvidiactl").exists()
