"""Compiles CUDA instances and fails where registers spill: `python tools/check_spills.py [name ...] [--all]`.

Names are those of tools/build/instances.py, such as forward_bf16_d128_plain; without any, one of each family and dtype.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.build import BuildError, from_environment
from tools.build.cuda import CudaBackend, compiler_path
from tools.build.instances import FAMILIES, Instance, InstanceFile

# Spill stores, in bytes, that a kernel may have. The plain forward of sm80 at 128 needs some ten words more than the
# 255 registers of a thread; what it spills is read once a key block, outside the multiplies. Sharing address registers
# between K and V avoids it, and costs a tenth of the speed: their fragments then need moves. The fp32 backward keeps
# two to five words of addresses there, Hopper's scored fp32 forward eight.
ALLOWED_BYTES = {
    "forward_bf16_d128_plain": 80,
    "forward_fp16_d128_plain": 80,
    "backward_fp32_d128_plain": 24,
    "forward_fp32_d128_scored": 32,
}

HEADER = re.compile(r"Compiling entry function '(?P<entry>\w+)' for '(?P<arch>\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel for one machine code."""

    entry: str
    arch: str
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    registers: int

    @property
    def spills(self) -> bool:
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0


def parse_ptxas(text: str) -> list[Usage]:
    """Reads the output of `ptxas -v`; raises ValueError where a kernel's figures are missing."""
    usages: list[Usage] = []
    pieces = re.split(r"(?=Compiling entry function)", text)
    for piece in pieces[1:]:
        header, spills, registers = HEADER.search(piece), SPILLS.search(piece), REGISTERS.search(piece)
        if header is None or spills is None or registers is None:
            raise ValueError(f"ptxas -v: no figures for a kernel in {piece[:200]!r}")
        stack, stores, loads = (int(figure) for figure in spills.groups())
        usages.append(Usage(header["entry"], header["arch"], stack, stores, loads, int(registers.group(1))))
    return usages


def default_choice(rows: list[Instance]) -> list[Instance]:
    """Plain, of each family and dtype, head dim 128 where there is a choice, and 96 of the forward; scored forwards."""

    def chosen(row: Instance) -> bool:
        forward = row.family.name == "Forward"
        if row.modified:
            return row.scored != "" and forward and row.head_dim in (64, 128)
        return row.head_dim in (0, 128) or (row.head_dim == 96 and forward)

    return list(filter(chosen, rows))


def usages_of(instance: Instance, backend: CudaBackend, folder: Path) -> list[Usage]:
    """Compiles one instance, machine code only."""
    file = InstanceFile(instance.machine, instance.name, (instance,))
    source = folder / f"{file.name}.cu"
    source.write_text(file.text)
    command = [
        backend.nvcc,
        *backend.flags(instance.machine),
        "-Xptxas=-v",
        "-c",
        str(source),
        "-o",
        str(source.with_suffix(".o")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{instance.name} does not compile:\n{result.stderr}")
    usages = parse_ptxas(result.stderr + result.stdout)
    codes = sum("code=sm_" in code for code in backend.codes(instance.machine))
    if not usages or len(usages) % codes != 0:  # an instance may have a small kernel beside its own
        raise BuildError(f"{instance.name}: {len(usages)} reports from ptxas for {codes} machine codes")
    return usages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="instances; default: one of each family and dtype")
    parser.add_argument("--all", action="store_true", help="every instance")
    arguments = parser.parse_args()
    if compiler_path() is None:
        print("spills: not checked (nvcc is not installed)")
        return 0
    try:
        config = replace(from_environment(), backend="cuda")
        backend = CudaBackend(config)
        rows = [row for rows in backend.tables().values() for row in rows]
        chosen = rows if arguments.all else default_choice(rows)
        if arguments.names:
            chosen = [row for row in rows if row.name in arguments.names]
        if not chosen or len(chosen) < len(arguments.names):
            raise BuildError(f"no such instance among {', '.join(row.name for row in rows)}")
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(config.jobs) as pool:
            reports = list(pool.map(lambda row: usages_of(row, backend, Path(folder)), chosen))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    spilled = 0
    for row, usages in zip(chosen, reports, strict=True):
        for usage in usages:
            too_much = usage.spills and usage.spill_store_bytes > ALLOWED_BYTES.get(row.name, 0)
            spilled += too_much
            verdict = f"{'SPILLS' if too_much else 'ok,'} {usage.spill_store_bytes} bytes" if usage.spills else "ok"
            print(f"{row.name:32} {usage.arch}  {usage.registers:3} registers, {usage.stack_bytes} stack  {verdict}")
    print(f"spills: {spilled} of {sum(map(len, reports))} kernels in {len(FAMILIES)} families spill more than allowed")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
