"""Bank conflicts in LDS, counted from the addresses that the layouts' own code computes on the (emulated) machine.

LDS has 32 banks of 4 bytes and serves 128 bytes a cycle. An access of a wave is served in groups of lanes that fill a
cycle: 32 lanes of 4 bytes or less, 16 of 8, 8 of 16; 16-byte reads take lanes 4i..4i+3 together with another four.
"""

import subprocess
import sys

import numpy as np
import pytest
from emulator import amdemu, is_available

from tools.build.config import ROOT
from tools.build.hip import compiler_path, hipify_engine
from tools.build.torch_package import find_torch

HIPIFY = ROOT / "tools/build/hipify.py"

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
FORWARD_KEYS = {
    2: {32: 64, 64: 64, 96: 64, 128: 64, 192: 32, 256: 32},
    4: {32: 64, 64: 32, 96: 32, 128: 32, 192: 16, 256: 16},
}
QUERIES = {
    2: {32: 32, 64: 32, 96: 32, 128: 32, 192: 16, 256: 16},
    4: {32: 32, 64: 16, 96: 32, 128: 16, 192: 16, 256: 16},
}
READ_GROUPS = [[*range(4 * a, 4 * a + 4), *range(4 * b, 4 * b + 4)] for a, b in ((0, 5), (1, 4), (2, 7), (3, 6))]
READ_GROUPS += [[lane + 32 for lane in group] for group in READ_GROUPS]


def cycles(offsets: np.ndarray, size: int, read: bool) -> tuple[int, int]:
    """(cycles that a wave's access takes, cycles without conflicts) for byte offsets [64], -1 where a lane is idle."""
    lanes = 128 // max(size, 4)
    groups = READ_GROUPS if size == 16 and read else np.arange(64).reshape(-1, lanes)
    taken = least = 0
    for group in groups:
        words = {int(at) // 4 + i for at in offsets[group] if at >= 0 for i in range(max(size // 4, 1))}
        banks = np.bincount([word % 32 for word in words], minlength=32) if words else np.zeros(1)
        taken += int(banks.max())
        least += bool(words)
    return taken, least


def total(lines: np.ndarray, size: int, read: bool) -> float:
    """Cycles taken by all accesses of all waves over those without conflicts."""
    both = [cycles(wave, size, read) for line in lines for wave in line.reshape(4, 64)]
    return sum(taken for taken, _ in both) / max(sum(least for _, least in both), 1)


def probes() -> dict[str, str]:
    """Kernel name to the macro call that defines it."""
    found = {}
    for d in HEAD_DIMS:
        for size, element in ((2, "Half"), (4, "float")):
            for what, rows in (("keys", FORWARD_KEYS[size][d]), ("queries", QUERIES[size][d])):
                twice = "true" if size == 2 and what == "queries" else "false"
                name = f"{element}_{what}_d{d}"
                found[f"straight_{name}"] = f"STRAIGHT({name}, {element}, {rows}, {d}, {twice})"
                if size == 2:
                    found[f"transposed_{name}"] = f"TRANSPOSED({name}, {rows}, {d})"
                else:
                    found[f"elements_{name}"] = f"ELEMENTS({name}, float, {rows}, {d}, {32 if rows % 32 == 0 else 16})"
    for element in ("Half", "float"):
        for rows in (16, 32):
            name = f"{element}_ds_{rows}"
            found[f"elements_{name}"] = f"ELEMENTS({name}, {element}, {rows}, {4 * rows}, {rows})"
    return found


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """The probe kernels."""
    if not is_available() or compiler_path() is None:
        pytest.skip("needs hipcc and the emulator (../shared/tools/amdemu)")
    folder = tmp_path_factory.mktemp("probe")
    subprocess.run([sys.executable, HIPIFY, ROOT, folder, hipify_engine(find_torch().folder)], check=True)
    (folder / "probes.inc").write_text("\n".join(probes().values()) + "\n")
    flags = ("-std=c++17", f"-I{folder / 'csrc'}", f"-I{folder}")
    return amdemu().compile_hip(ROOT / "tests/hip/layout_probe.hip", folder / "probe.hsaco", "gfx90a", flags)


def lines_of(code, name: str, arrays: int) -> list[np.ndarray]:
    out = [np.zeros((512, 256), np.int32) for _ in range(arrays)]
    counts = np.zeros(arrays, np.int32)
    amdemu().launch(code, name, grid=1, block=256, args=[*out, counts])
    return [lines[:count] for lines, count in zip(out, counts, strict=True)]


def rows_and_dim(name: str) -> tuple[int, int]:
    """Of a probe's tile."""
    _, element, what, dim = name.split("_")
    table = {"keys": FORWARD_KEYS, "queries": QUERIES}[what][2 if element == "Half" else 4]
    return table[int(dim[1:])], int(dim[1:])


@pytest.mark.parametrize("name", [name for name in probes() if name.startswith("straight")])
def test_rows(code, name):
    """16-byte reads and writes; writes only of chunks in the order that the transposed copy wants may meet in pairs."""
    writes, reads32, reads16 = lines_of(code, name, 3)
    rows, dim = rows_and_dim(name)
    assert len(reads32) == 0 or total(reads32, 16, True) == 1.0
    assert total(reads16, 16, True) == 1.0
    is_also_transposed = name.startswith("straight_Half_queries")
    assert total(writes, 16, False) <= (2.0 if is_also_transposed and (rows == 16 or dim % 64) else 1.0)


@pytest.mark.parametrize("name", [name for name in probes() if name.startswith("transposed")])
def test_columns(code, name):
    """Reads of 16 bytes, or 8 where a tile has only 16 rows; writes of 8, or 4 where a thread has but two rows."""
    writes, reads32, reads16 = lines_of(code, name, 3)
    rows, dim = rows_and_dim(name)
    assert len(reads32) == 0 or total(reads32, 16, True) == 1.0
    assert total(reads16, 16 if rows % 32 == 0 else 8, True) == 1.0
    written = 8 if rows // 4 * (dim // 8) >= 256 else 4
    assert total(writes, written, False) <= (2.0 if rows == 32 and dim % 64 else 1.0)


@pytest.mark.parametrize("name", [name for name in probes() if name.startswith("elements")])
def test_elements(code, name):
    (lines,) = lines_of(code, name, 1)
    assert total(lines, 4, True) == 1.0
