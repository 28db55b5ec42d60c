"""`python -m tools.build.loop_model`: how close the AMD kernels' main loops come to the matrix units' bound.

For every kernel asked for, the path that an unmasked block takes through the loop that multiplies is cut out of the
disassembly. Its matrix instructions' passes and the other vector instructions' issue cycles are added up, and llvm-mca
models the loop: one wave, in order, with latencies. A cycle is that of the instruction issue, four of the clock's, in
which a vector instruction of 64 lanes passes a SIMD of 16; a matrix instruction takes 8 or 16. Needs hipcc, and LLVM's
llvm-objdump and llvm-mca; no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tools.build.code_objects import device_code
from tools.build.config import from_environment
from tools.build.errors import BuildError
from tools.build.hip_kernels import CompiledKernel, compile_kernels, compiled_kernels

LINE = re.compile(r"^\t(?P<text>\S.*?)\s*// (?P<address>[0-9A-F]{12}):(?:.*\+0x(?P<target>[0-9a-f]+)>)?")
SYMBOL = re.compile(r"^(?P<address>[0-9a-f]{16}) <(?P<name>.*)>:")
MODELLED_TURNS = 20
# Passes of the matrix instructions in use, and issue cycles of vector instructions that take more than one.
PASSES = {"32x32x8f16": 16, "32x32x8bf16_1k": 16, "32x32x2f32": 16}
PASSES |= {"16x16x16f16": 8, "16x16x16bf16_1k": 8, "16x16x4f32": 8}
QUARTER_RATE = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f32|v_mul_(lo|hi)_[ui]32|v_mad_[ui]64_[ui]32")


Weight = tuple[int, int, int]


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def matrix_cycles(self) -> int:
        shape = self.name.removeprefix("v_mfma_f32_")
        return PASSES[shape] if shape != self.name else 0

    @property
    def vector_cycles(self) -> int:
        """Issue cycles of a vector instruction that is no matrix instruction."""
        if not self.name.startswith("v_") or self.matrix_cycles:
            return 0
        return 4 if QUARTER_RATE.match(self.name) else 1

    @property
    def bytes_moved(self) -> int:
        """Of a lane, between device memory, LDS and registers: what an unmasked step cannot do without."""
        if self.name.startswith("buffer_load_dword"):
            return 4 * int(self.name.removeprefix("buffer_load_dwordx") if "dwordx" in self.name else 1)
        found = re.match(r"ds_(?:read|write)(2?)(?:st64)?_[bu](\d+)", self.name)
        return (2 if found[1] else 1) * int(found[2]) // 8 if found else 0


@dataclass(frozen=True)
class Block:
    """A basic block: instructions that run together, and where control goes then."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]

    @cached_property
    def weight(self) -> Weight:
        """What a path should have most of: products, then data moved, then as little else as can be. Data that is then
        selected from does not count: masks and the ends of tensors do that, and the path in question has neither."""
        selects = sum(one.name.startswith("v_cndmask") for one in self.instructions)
        return (
            sum(one.matrix_cycles for one in self.instructions),
            sum(one.bytes_moved for one in self.instructions) - 4 * selects,
            -len(self.instructions),
        )


@dataclass(frozen=True)
class LoopModel:
    """One turn of a kernel's main loop, in issue cycles."""

    matrix: int
    vector: int
    instructions: int
    modelled: float

    @property
    def share(self) -> float:
        return self.matrix / self.modelled


def tool(name: str) -> str:
    """An LLVM program: ROCm's, or the distribution's newest."""
    folders = [os.environ.get("ROCM_HOME", "/opt/rocm") + "/llvm/bin", *os.environ.get("PATH", "").split(":")]
    for candidate in (name, *(f"{name}-{version}" for version in range(22, 13, -1))):
        found = shutil.which(candidate, path=":".join(folders))
        if found:
            return found
    raise BuildError(f"{name} was not found (install LLVM's tools, or set ROCM_HOME)")


def disassemble(code: bytes, symbol: str, arch: str) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".elf") as file:
        file.write(code)
        file.flush()
        command = [tool("llvm-objdump"), "-d", f"--mcpu={arch}", "--no-show-raw-insn", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found, start = [], None
    for line in lines:
        if header := SYMBOL.match(line):
            start = int(header["address"], 16) if header["name"] == symbol else None
        elif start is not None and (match := LINE.match(line)):
            target = start + int(match["target"], 16) if match["target"] else None
            found.append(Instruction(int(match["address"], 16), match["text"], target))
    return found


def basic_blocks(code: list[Instruction]) -> dict[int, Block]:
    """By the address of the first instruction."""
    follows = dict(zip((one.address for one in code), (one.address for one in code[1:]), strict=False))
    branches = [one for one in code if "branch" in one.name or one.name == "s_endpgm"]
    starts = {code[0].address, *(one.target for one in branches if one.target is not None)}
    starts |= {follows[one.address] for one in branches if one.address in follows}
    blocks: dict[int, Block] = {}
    current: list[Instruction] = []
    for one in code:
        current.append(one)
        following = follows.get(one.address)
        if following is None or following in starts:
            falls_through = one.name not in ("s_branch", "s_endpgm") and following is not None
            successors = (*((one.target,) if one.target else ()), *((following,) if falls_through else ()))
            blocks[current[0].address] = Block(tuple(current), successors)
            current = []
    return blocks


def loops(blocks: dict[int, Block], entry: int) -> Iterator[tuple[int, frozenset[int]]]:
    """(header, members) of every natural loop, found by its back edges in a depth-first walk."""
    predecessors: dict[int, set[int]] = {address: set() for address in blocks}
    for address, block in blocks.items():
        for following in block.successors:
            predecessors[following].add(address)
    state: dict[int, int] = {}  # 1: on the stack, 2: done
    stack = [(entry, iter(blocks[entry].successors))]
    state[entry] = 1
    tails: dict[int, set[int]] = {}
    while stack:
        address, left = stack[-1]
        successor = next(left, None)
        if successor is None:
            state[address] = 2
            stack.pop()
        elif state.get(successor) == 1:
            tails.setdefault(successor, set()).add(address)
        elif successor not in state:
            state[successor] = 1
            stack.append((successor, iter(blocks[successor].successors)))
    for header, ends in tails.items():
        members, todo = {header}, list(ends)
        while todo:
            member = todo.pop()
            if member not in members:
                members.add(member)
                todo += predecessors[member]
        yield header, frozenset(members)


def heaviest_path(blocks: dict[int, Block], header: int, members: frozenset[int]) -> list[Instruction]:
    """The path round the loop that an unmasked step takes: see Block.weight."""
    best: dict[
        int, tuple[Weight, int]
    ] = {}  # to a block that leads back to the header: the weight up to there, and how

    def visit(address: int, above: frozenset[int]) -> None:
        choices = []
        for successor in blocks[address].successors:
            if successor in members and successor != header and successor not in best and successor not in above:
                visit(successor, above | {address})
            if successor == header:
                choices.append(((0, 0, 0), header))
            elif successor in best:
                choices.append((best[successor][0], successor))
        if choices:
            (products, moved, others), successor = max(choices)
            own = blocks[address].weight
            best[address] = ((own[0] + products, own[1] + moved, own[2] + others), successor)

    visit(header, frozenset())
    path = list(blocks[header].instructions)
    address = best[header][1]
    while address != header:
        path += blocks[address].instructions
        address = best[address][1]
    return path


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """One turn of the innermost loop that holds the most products."""
    blocks = basic_blocks(code)

    def products(members: frozenset[int]) -> int:
        return sum(blocks[address].weight[0] for address in members)

    header, members = max(loops(blocks, code[0].address), key=lambda loop: (products(loop[1]), -len(loop[1])))
    return heaviest_path(blocks, header, members)


def modelled_cycles(path: list[Instruction], arch: str) -> float:
    """llvm-mca's cycles of one turn, with the turns before and after it."""
    text = "\n".join(re.sub(r"^(s_c?branch\S*) .*", r"\1 0", one.text) for one in path)
    command = [tool("llvm-mca"), "-mtriple=amdgcn", f"-mcpu={arch}", f"-iterations={MODELLED_TURNS}"]
    done = subprocess.run([*command, "-"], input=text, capture_output=True, text=True)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if found is None:
        raise BuildError(f"llvm-mca failed:\n{done.stderr[:2000]}")
    return int(found[1]) / MODELLED_TURNS


def model(code: list[Instruction], arch: str) -> LoopModel:
    path = main_loop(code)
    return LoopModel(
        matrix=sum(one.matrix_cycles for one in path),
        vector=sum(one.vector_cycles for one in path),
        instructions=len(path),
        modelled=modelled_cycles(path, arch),
    )


def model_kernel(kernel: CompiledKernel) -> LoopModel:
    for code in device_code(kernel.code.read_bytes()):
        instructions = disassemble(code, kernel.resources.name, kernel.instance.machine.name)
        if instructions:
            return model(instructions, kernel.instance.machine.name)
    raise BuildError(f"{kernel.code}: no kernel {kernel.resources.name}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build.loop_model", description=__doc__)
    parser.add_argument("names", nargs="*", help="instances, such as forward_fp16_d128_plain (default: all plain)")
    names = parser.parse_args().names
    try:
        config = from_environment({**os.environ, "FLASH_ATTENTION_BACKEND": "hip"})
        kernels = list(compiled_kernels(config, compile_kernels(config)))
        print("| kernel | rows x keys | MFMA | VALU | instructions | llvm-mca | MFMA share |")
        print("|---|---|---|---|---|---|---|")
        for kernel in kernels:
            instance = kernel.instance
            chosen = instance.name in names if names else instance.family.alone and not instance.modified
            if chosen:
                one = model_kernel(kernel)
                numbers = f"{one.matrix} | {one.vector} | {one.instructions} | {one.modelled:.0f} | {one.share:.0%}"
                print(f"| {instance.name} | {kernel.info.block_m} x {kernel.info.block_n} | {numbers} |")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
