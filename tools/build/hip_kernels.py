"""`python -m tools.build.hip_kernels`: every AMD kernel, compiled and examined. Needs hipcc, no GPU, no ROCm torch.

Compiles the instances that FLASH_ATTENTION_INSTANCES asks for (all, by default) and the library of their table, prints
what each takes of the machine, and fails where one spills registers, uses scratch or more LDS than a compute unit has.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.build import ninja_file
from tools.build.code_objects import KernelResources, kernels
from tools.build.config import Config, from_environment
from tools.build.cpu import CpuBackend
from tools.build.errors import BuildError
from tools.build.hip import TABLE_LIBRARY, HipBackend
from tools.build.instances import ELEMENTS, Instance, instance_files

LDS_BYTES = 64 * 1024


class KernelKey(ctypes.Structure):
    """KernelKey of core/registry.h."""

    _fields_ = [
        ("kind", ctypes.c_int8),
        ("dtype", ctypes.c_int8),
        ("head_dim", ctypes.c_int),
        ("modified", ctypes.c_bool),
        ("performance", ctypes.c_bool),
        ("scored", ctypes.c_int8),
    ]


class KernelInfo(ctypes.Structure):
    """KernelInfo of core/registry.h."""

    _fields_ = [
        ("key", KernelKey),
        *(
            (name, ctypes.c_int)
            for name in ("block_m", "block_n", "threads", "shared_bytes", "stash_bytes", "stash_device_bytes")
        ),
        ("blocks", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_void_p),
    ]


class KernelTable(ctypes.Structure):
    """KernelTable of core/registry.h."""

    _fields_ = [
        ("machine", ctypes.c_char_p),
        ("kernels", ctypes.POINTER(ctypes.POINTER(KernelInfo))),
        ("count", ctypes.c_int),
        ("has_performance_mode", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class CompiledKernel:
    """One instance: where it is, what the host knows of it, what it takes."""

    instance: Instance
    code: Path  # the object file that holds its code object
    info: KernelInfo
    resources: KernelResources

    @property
    def lds_bytes(self) -> int:
        """Of a block that folds several chunks, which is the most it asks for."""
        return self.resources.lds_bytes + self.info.shared_bytes + self.info.stash_bytes

    @property
    def problems(self) -> list[str]:
        found = [] if self.resources.is_lean else ["registers spilled, or scratch"]
        found += [f"{self.lds_bytes} bytes of LDS"] if self.lds_bytes > LDS_BYTES else []
        return found


def compile_kernels(config: Config, *, verbose: bool = False) -> Path:
    """Brings objects and table library up to date; returns the library."""
    hip = HipBackend(config)
    command = [*ninja_file.find_ninja(), "-C", str(config.folder), "-f", "kernels.ninja", "-j", str(config.jobs)]
    with ninja_file.locked(config.folder):
        hip.hipify()
        steps = hip.kernel_steps()
        rules = {**hip.rules(), "cxx": CpuBackend(config).rules()["cxx"]}
        steps += hip.table_steps(steps)
        ninja_file.write_if_changed(config.folder / "kernels.ninja", ninja_file.render(rules, steps, TABLE_LIBRARY))
        sys.stdout.flush()
        if subprocess.run([*command, *(["-v"] if verbose else [])]).returncode != 0:
            raise BuildError(f"a compiler failed; its words are above (to repeat: {' '.join(command)})")
    return config.folder / TABLE_LIBRARY


def mangled_part(instance: Instance) -> str:
    """`Forward<...>` as it appears in its kernel's mangled name."""
    head_dim = instance.head_dim or int(instance.template.split(",")[2])
    element = {"float": "f"}.get(
        ELEMENTS[instance.dtype], f"NS_{len(ELEMENTS[instance.dtype])}{ELEMENTS[instance.dtype]}E"
    )
    parts = (instance.family.name, instance.machine.arch)
    family, arch = (f"NS_{len(part)}{part}" for part in parts)
    arch = f"NS_15PerformanceModeI{arch}EEE" if instance.performance else f"{arch}E"
    return f"{family}I{arch}NS_7ProblemI{element}Li{head_dim}ELb{int(instance.modified)}EEEE"


def compiled_kernels(config: Config, library: Path) -> Iterator[CompiledKernel]:
    """Everything in the table library."""
    access = ctypes.CDLL(str(library)).flash_attn_kernel_table
    access.restype = ctypes.POINTER(KernelTable)
    hip = HipBackend(config)
    for index, machine in enumerate(hip.machines):
        table = access(index).contents
        infos = iter(table.kernels[i].contents for i in range(table.count))
        by_instance = dict(zip(hip.tables()[machine], infos, strict=True))
        for file in instance_files(machine, config):
            code = config.folder / hip.object_path(machine.name, Path(f"{file.name}.hip"))
            found = kernels(code)
            for instance in file.instances:
                resources = [kernel for kernel in found if mangled_part(instance) in kernel.name]
                if len(resources) != 1:
                    raise BuildError(f"{code}: {len(resources)} kernels called {mangled_part(instance)}")
                yield CompiledKernel(instance, code, by_instance[instance], resources[0])


def report(found: list[CompiledKernel]) -> str:
    """A line for every kernel."""
    head = (
        "kernel",
        "rows x keys",
        "threads",
        "VGPR",
        "of them A",
        "SGPR",
        "waves",
        "LDS",
        "+ stash",
        "VGPR spills",
        "SGPR spills",
        "private segment",
    )
    lines: list[tuple[str, ...]] = [head]
    for kernel in found:
        info, used = kernel.info, kernel.resources
        block = f"{info.block_m} x {info.block_n}"
        numbers = (info.threads, used.vgprs, used.agprs, used.sgprs, used.waves, info.shared_bytes + used.lds_bytes)
        spills = (used.vgpr_spills, used.sgpr_spills, used.scratch_bytes)
        row = (kernel.instance.name, block, *numbers, info.stash_bytes, *spills)
        lines.append(tuple(str(value) for value in row))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = (
        "  ".join(
            value.ljust(width) if i == 0 else value.rjust(width)
            for i, (value, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build.hip_kernels", description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="show whole command lines")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        config = from_environment({**os.environ, "FLASH_ATTENTION_BACKEND": "hip"})
        found = list(compiled_kernels(config, compile_kernels(config, verbose=arguments.verbose)))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(found))
    print(f"flash_attn: {len(found)} AMD kernels in {time.perf_counter() - start:.0f} s")
    wrong = [f"{kernel.instance.name}: {', '.join(kernel.problems)}" for kernel in found if kernel.problems]
    print("".join(f"error: {line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
