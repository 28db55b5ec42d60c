"""The table of what is compiled, and the instance files made from it.

A kernel template never names an arch, and an arch never names a kernel: an instance file includes one of each. Every
file, the registry and the budgets that the tests watch come from the tables below.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tools.build.config import Config
from tools.build.errors import BuildError
from tools.build.ninja_file import write_if_changed

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
GPU_DTYPES = ("fp16", "bf16", "fp32")
CPU_DTYPES = ("fp16", "bf16", "fp32", "fp64")

ELEMENTS = {"fp16": "Half", "bf16": "BFloat16", "fp32": "float", "fp64": "double"}
DTYPE_ENUMERATORS = {"fp16": "kFloat16", "bf16": "kBFloat16", "fp32": "kFloat32", "fp64": "kFloat64"}


@dataclass(frozen=True)
class Family:
    """One kernel template: what it is compiled for, and how many of its instances share a file."""

    name: str  # the template; KernelKind has k<name>
    header: str
    by_head_dim: bool
    by_modified: bool  # with and without softcap, ALiBi, dropout ...
    alone: bool  # heavy: an instance file each
    performance: tuple[str, ...] = ()  # dtypes whose arithmetic the performance mode changes


FAMILIES = (
    Family("Forward", "cuda/kernels/forward.cuh", True, by_modified=True, alone=True, performance=("fp16", "bf16")),
    Family("Backward", "cuda/kernels/backward.cuh", True, by_modified=True, alone=True, performance=("fp16", "bf16")),
    Family("FinishDq", "cuda/kernels/finish_dq.cuh", by_head_dim=True, by_modified=False, alone=False),
    Family("Preprocess", "cuda/kernels/preprocess.cuh", True, by_modified=False, alone=False, performance=("fp16",)),
    Family("Combine", "cuda/kernels/combine.cuh", by_head_dim=False, by_modified=False, alone=False),
    Family("Append", "cuda/kernels/append.cuh", by_head_dim=False, by_modified=False, alone=False),
)


@dataclass(frozen=True)
class Machine:
    """One machine code: an arch for the templates, and the compiler flags that make it."""

    name: str
    backend: str
    header: str
    arch: str  # the C++ type
    dtypes: tuple[str, ...]
    flags: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = HEAD_DIMS
    processors: tuple[str, ...] = ()  # platform.machine() values; empty: any
    # Which of plain and modified (False, True) are compiled for the performance mode; none: to nearest is free here.
    performance_kinds: tuple[bool, ...] = ()
    # Families with loops of its own for softcap, ALiBi and dropout, in 16 bits for softcap alone, too; their head dims.
    scored: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def has_performance_mode(self) -> bool:
        return bool(self.performance_kinds)

    @property
    def identifier(self) -> str:
        return self.name.replace("-", "_")

    def padded(self, head_dim: int) -> int:
        """The compiled size that serves a head dimension; 0 stays 0."""
        return head_dim and min(size for size in self.head_dims if size >= head_dim)


_X86 = ("x86_64", "AMD64")


def _host(name: str, dtypes: tuple[str, ...], flags: tuple[str, ...], processors: tuple[str, ...] = _X86) -> Machine:
    return Machine(name, "cpu", "cpu/arch.h", "Host", dtypes, flags, (64, 128, 256), processors, (True,))


# The host's levels are those of the x86-64 psABI, and above them what multiplies bf16; "generic" runs anywhere, Arm
# included. Host kernels skip the padding of head_dim, so few sizes do. Best machine first: cpu/machine.cpp.
_V4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
MACHINES = (
    _host("x86-64-v4-bf16", ("bf16",), (*_V4, "-mavx512bf16")),
    _host("x86-64-v4", CPU_DTYPES, _V4),
    _host("x86-64-v3", CPU_DTYPES, ("-march=x86-64-v3",)),
    _host("generic", CPU_DTYPES, (), processors=()),
    Machine(
        "sm90",
        "cuda",
        "cuda/sm90/arch.cuh",
        "Sm90",
        GPU_DTYPES,
        scored=(("Forward", HEAD_DIMS[1:]), ("Backward", HEAD_DIMS[1:])),
    ),
    Machine("sm80", "cuda", "cuda/sm80/arch.cuh", "Sm80", GPU_DTYPES),
    Machine("gfx90a", "hip", "hip/gfx90a/arch.cuh", "Gfx90a", GPU_DTYPES, performance_kinds=(False, True)),
    Machine("gfx942", "hip", "hip/gfx942/arch.cuh", "Gfx942", GPU_DTYPES, performance_kinds=(False, True)),
)

# What nvcc compiles the sm80 machine for: "80", "9.0", "sm_90"; see cuda.py.
CUDA_ARCH = re.compile(r"(?:sm_)?(\d{1,2})\.?(\d)(a?)")

# What a machine's own modified loops are compiled for, as instances' names have it and as core/params.h.
SCORED = {"softcap": "kSoftcap", "scored": "kAny"}

# Instances a machine may have: compile time and binary size grow with it.
MAX_INSTANCES_OF_A_MACHINE = 176


@dataclass(frozen=True)
class Instance:
    """One kernel of the binary."""

    machine: Machine
    family: Family
    dtype: str
    head_dim: int = 0  # 0: the family does not depend on it
    modified: bool = False
    performance: bool = False  # with the performance mode's arithmetic
    scored: str = ""  # of SCORED: modified, in the machine's own loops

    @property
    def name(self) -> str:
        """`forward_bf16_d128_plain`, `forward_bf16_d128_plain_performance`"""
        parts = [self.family.name.lower(), self.dtype]
        parts += [f"d{self.head_dim}"] if self.family.by_head_dim else []
        kind = self.scored or ("modified" if self.modified else "plain")
        parts += [kind] if self.family.by_modified else []
        parts += ["performance"] if self.performance else []
        return "_".join(parts)

    @property
    def symbol(self) -> str:
        return f"flash_attn_{self.machine.identifier}_{self.name}"

    @property
    def arch(self) -> str:
        arch = f"{self.machine.arch}Scored<{self._modifiers}>" if self.scored else self.machine.arch
        return f"PerformanceMode<{arch}>" if self.performance else arch

    @property
    def template(self) -> str:
        head_dim = self.head_dim or HEAD_DIMS[0]
        problem = f"Problem<{ELEMENTS[self.dtype]}, {head_dim}, {str(self.modified).lower()}>"
        return f"{self.family.name}<{self.arch}, {problem}>"

    @property
    def key(self) -> str:
        dtype = f"DType::{DTYPE_ENUMERATORS[self.dtype]}"
        flags = ", ".join(str(flag).lower() for flag in (self.modified, self.performance))
        return f"{{KernelKind::k{self.family.name}, {dtype}, {self.head_dim}, {flags}, {self._modifiers}}}"

    @property
    def _modifiers(self) -> str:
        return f"Modifiers::{SCORED.get(self.scored, 'kNone')}"


@dataclass(frozen=True)
class InstanceFile:
    """What one compiler process compiles."""

    machine: Machine
    name: str
    instances: tuple[Instance, ...]

    @property
    def text(self) -> str:
        is_host = self.machine.backend == "cpu"
        headers = [self.machine.header, *sorted({instance.family.header for instance in self.instances})]
        headers += ["cuda/tile/performance.cuh"] if any(instance.performance for instance in self.instances) else []
        headers.append("cpu/instance.h" if is_host else "cuda/instance.cuh")
        # constexpr: code for a better processor than the one at hand must not run when the library is loaded.
        const = "constexpr" if is_host else "const"
        lines = ["// Generated by tools/build/instances.py.", *(f'#include "{header}"' for header in headers), ""]
        lines += ["namespace flash_attn {", 'extern "C" {', ""]
        for instance in self.instances:
            lines.append(f"extern const KernelInfo {instance.symbol};")
            lines.append(f"{const} KernelInfo {instance.symbol} = kernel_info<{instance.template}>({instance.key});")
            lines.append("")
        return "\n".join([*lines, '}  // extern "C"', "}  // namespace flash_attn", ""])


def machines(config: Config, backend: str, processor: str) -> tuple[Machine, ...]:
    """The machines of a backend that the config asks for; `processor` is platform.machine()."""
    names = [machine.name for machine in MACHINES]
    for arch in config.archs:
        if arch not in names and not CUDA_ARCH.fullmatch(arch):
            raise BuildError(
                f"FLASH_ATTENTION_ARCHS: must be of {', '.join(names)}, or CUDA's as in 80;90, got {arch!r}"
            )
    for size in {size for sizes in config.subset.values() for size in sizes} - set(HEAD_DIMS):
        raise BuildError(f"FLASH_ATTENTION_INSTANCES: head dims must be of {HEAD_DIMS}, got {size}")
    known = [machine for machine in MACHINES if machine.backend == backend]
    built = [machine for machine in known if not machine.processors or processor in machine.processors]
    asked = [machine for machine in built if machine.name in config.archs]
    return tuple(asked or built)


def instances(machine: Machine, config: Config) -> Iterator[Instance]:
    """The rows of the table for one machine, inside the config's subset."""
    for family in FAMILIES:
        modified = (False, True) if family.by_modified else (False,)
        for dtype in machine.dtypes:
            sizes = HEAD_DIMS if family.by_head_dim else (0,)
            wanted = {machine.padded(size) for size in sizes if config.wants(dtype, size)}
            for row in product(sorted(wanted), modified):
                yield Instance(machine, family, dtype, *row)
    yield from performance_instances(machine, config)
    for family in FAMILIES:
        own = dict(machine.scored).get(family.name, ())
        for dtype, size, scored in product(machine.dtypes, own, SCORED):
            if config.wants(dtype, size) and (scored, dtype) != ("softcap", "fp32"):
                yield Instance(machine, family, dtype, size, modified=True, scored=scored)


def performance_instances(machine: Machine, config: Config) -> Iterator[Instance]:
    """The same for the performance mode. Families that do not multiply serve both modes."""
    for family in FAMILIES if config.use_rtz and machine.performance_kinds else ():
        for dtype in family.performance:
            modified = machine.performance_kinds if family.by_modified else (False,)
            wanted = {machine.padded(size) for size in HEAD_DIMS if config.wants(dtype, size)}
            for row in product(sorted(wanted), modified):
                yield Instance(machine, family, dtype, *row, performance=True)


def instance_files(machine: Machine, config: Config) -> tuple[InstanceFile, ...]:
    """Heavy instances in a file each (on the host: with the modified or 16-bit twin), a dtype's light ones together."""
    groups: dict[str, list[Instance]] = {}
    for instance in instances(machine, config):
        if not instance.family.alone:
            name = f"light_{instance.dtype}"
        elif machine.backend == "cpu":
            kind = "performance" if instance.performance else instance.dtype
            name = f"{instance.family.name.lower()}_{kind}_d{instance.head_dim}"
        else:
            name = instance.name
        groups.setdefault(name, []).append(instance)
    return tuple(InstanceFile(machine, name, tuple(group)) for name, group in groups.items())


def write_instance_files(files: tuple[InstanceFile, ...], folder: Path, suffix: str) -> tuple[Path, ...]:
    """Writes the files' sources into folder/<machine>; returns their paths, in order."""
    paths = tuple(folder / file.machine.name / f"{file.name}{suffix}" for file in files)
    for file, path in zip(files, paths, strict=True):
        write_if_changed(path, file.text)
    return paths


def registry_source(tables: dict[Machine, tuple[Instance, ...]]) -> str:
    """kernels.cpp: defines kernel_tables() of core/registry.h."""
    lines = ["// Generated by tools/build/instances.py.", '#include "core/registry.h"', "", "namespace flash_attn {"]
    lines.append('extern "C" {')
    lines += [f"extern const KernelInfo {row.symbol};" for rows in tables.values() for row in rows]
    lines += ['}  // extern "C"', "", "namespace {", ""]
    for machine, rows in tables.items():
        lines.append(f"const KernelInfo* const {machine.identifier}_kernels[] = {{")
        lines += [f"    &{row.symbol}," for row in rows]
        lines += ["};"]
        has_mode = str(machine.has_performance_mode).lower()
        fields = f'"{machine.name}", {machine.identifier}_kernels, {len(rows)}, {has_mode}'
        lines.append(f"const KernelTable {machine.identifier} = {{{fields}}};")
        lines.append("")
    lines.append("const KernelTable* const tables[] = {")
    lines += [f"    &{machine.identifier}," for machine in tables]
    lines += ["};", "", "}  // namespace", ""]
    lines.append(f"KernelTables kernel_tables() {{ return {{tables, {len(tables)}}}; }}")
    return "\n".join([*lines, "", "}  // namespace flash_attn", ""])
