"""Reads AMD code objects: what a compiled kernel takes of the machine, from the metadata that the compiler leaves.

Formats: ELF64; clang's offload bundle in the section .hip_fatbin; the note NT_AMDGPU_METADATA, which is MessagePack
(LLVM's AMDGPU usage guide, "Code Object Metadata").
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.build.errors import BuildError

BUNDLE_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"
SHT_NOTE = 7
NT_AMDGPU_METADATA = 32


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes: registers and bytes of scratch per lane, bytes of LDS as fixed at compile time."""

    name: str  # mangled
    vgprs: int  # accumulation registers included
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    max_threads: int

    @property
    def waves(self) -> int:
        """Waves that fit on a SIMD of gfx90a with its 512 registers, in steps of 8, at most 8."""
        return min(8, 512 // (-(-max(self.vgprs, 1) // 8) * 8))

    @property
    def is_lean(self) -> bool:
        """Nothing spilled, neither to memory nor to lanes of vector registers, and no scratch memory."""
        return self.vgpr_spills == self.sgpr_spills == self.scratch_bytes == 0


def sections(elf: bytes) -> Iterator[tuple[str, int, bytes]]:
    """(name, type, content) of an ELF64 file's sections."""
    if elf[:5] != b"\x7fELF\x02":
        raise BuildError("a code object must be ELF64")
    table, size, count, names_index = struct.unpack_from("<Q10xHHH", elf, 0x28)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names_at = headers[names_index][4]
    for name_at, kind, _, _, offset, length in headers:
        start = names_at + name_at
        name = elf[start : elf.index(b"\0", start)].decode()
        yield name, kind, elf[offset : offset + length]


def device_code(data: bytes) -> list[bytes]:
    """The code objects of an object file or library that hipcc made, or of a bundle."""
    if data.startswith(b"\x7fELF"):
        bundles = [content for name, _, content in sections(data) if name == ".hip_fatbin"]
    else:
        bundles = [data]
    found = []
    for bundle in bundles:
        at = bundle.find(BUNDLE_MAGIC)
        if at < 0:
            raise BuildError("no offload bundle found (a compressed one? compile with -no-offload-compress)")
        while at >= 0:
            found += _bundle_entries(bundle[at:])
            at = bundle.find(BUNDLE_MAGIC, at + 1)
    return found


def _bundle_entries(bundle: bytes) -> list[bytes]:
    count, at = struct.unpack_from("<Q", bundle, len(BUNDLE_MAGIC))[0], len(BUNDLE_MAGIC) + 8
    found = []
    for _ in range(count):
        offset, size, name_size = struct.unpack_from("<QQQ", bundle, at)
        name = bundle[at + 24 : at + 24 + name_size].decode()
        at += 24 + name_size
        if name.startswith("hip") and size > 0:
            found.append(bundle[offset : offset + size])
    return found


def notes(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, description) of a note section."""
    at = 0
    while at + 12 <= len(content):
        name_size, size, kind = struct.unpack_from("<III", content, at)
        start = at + 12 + (name_size + 3 & ~3)
        yield kind, content[start : start + size]
        at = start + (size + 3 & ~3)


def unpack(data: bytes, at: int = 0) -> tuple[Any, int]:
    """One MessagePack value and where the next begins."""
    tag = data[at]
    at += 1
    if tag < 0x80 or tag >= 0xE0:
        return tag if tag < 0x80 else tag - 256, at
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if 0xCC <= tag <= 0xD3:
        form = "BHIQbhiq"[tag - 0xCC]
        return struct.unpack_from(f">{form}", data, at)[0], at + struct.calcsize(form)
    if tag < 0xC0:
        kind, size = ("map", tag & 15) if tag < 0x90 else ("array", tag & 15) if tag < 0xA0 else ("text", tag & 31)
    else:
        kinds = {0xD9: ("text", "B"), 0xDA: ("text", "H"), 0xDB: ("text", "I")}
        kinds |= {0xDC: ("array", "H"), 0xDD: ("array", "I"), 0xDE: ("map", "H"), 0xDF: ("map", "I")}
        kind, form = kinds[tag]
        size = struct.unpack_from(f">{form}", data, at)[0]
        at += struct.calcsize(form)
    if kind == "text":
        return data[at : at + size].decode(), at + size
    values = []
    for _ in range(size * (2 if kind == "map" else 1)):
        value, at = unpack(data, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if kind == "map" else values), at


def kernels(path: Path) -> list[KernelResources]:
    """All kernels in an object file, library or bundle."""
    found = []
    for code in device_code(path.read_bytes()):
        for _, kind, content in sections(code):
            for note, description in notes(content) if kind == SHT_NOTE else ():
                if note == NT_AMDGPU_METADATA:
                    found += [_resources(kernel) for kernel in unpack(description)[0]["amdhsa.kernels"]]
    return found


def _resources(metadata: dict[str, Any]) -> KernelResources:
    return KernelResources(
        name=metadata[".name"],
        vgprs=metadata[".vgpr_count"],
        agprs=metadata.get(".agpr_count", 0),
        sgprs=metadata[".sgpr_count"],
        vgpr_spills=metadata[".vgpr_spill_count"],
        sgpr_spills=metadata[".sgpr_spill_count"],
        scratch_bytes=metadata[".private_segment_fixed_size"],
        lds_bytes=metadata[".group_segment_fixed_size"],
        max_threads=metadata[".max_flat_workgroup_size"],
    )
