"""Enforces who may include whom in csrc: `python tools/check_layering.py [csrc]`.

The arrows are those of docs/architecture.md. A file may include its own folder and those listed for it; no kernel
names an arch, and vendors' macros stay in compat.cuh and in the arch folders.
"""

import re
import sys
from pathlib import Path

# Folder (longest prefix wins) -> what it may include besides itself and the standard library.
ALLOWED: dict[str, tuple[str, ...]] = {
    "core": (),
    "backend.h": ("core",),
    "binding": ("core", "backend.h", "torch"),
    "cuda/compat.cuh": ("vendor",),
    "cuda/tile": ("cuda/compat.cuh", "core"),
    "cuda/attention": ("cuda/tile", "cuda/compat.cuh", "core"),
    "cuda/kernels": ("cuda/attention", "cuda/tile", "cuda/compat.cuh", "core"),
    "cuda/sm80": ("cuda/tile", "cuda/compat.cuh", "core", "vendor"),
    "cuda/sm90": ("cuda/sm80", "cuda/kernels", "cuda/attention", "cuda/tile", "cuda/compat.cuh", "core", "vendor"),
    "cuda/instance.cuh": ("cuda/compat.cuh", "core"),
    "cuda/launch.cu": ("cuda/attention", "cuda/compat.cuh", "core", "backend.h", "vendor"),
    "hip/gfx90a": ("cuda/tile", "cuda/compat.cuh", "core", "vendor"),
    "hip/gfx942": ("hip/gfx90a",),
    "cpu": ("cuda/tile", "cuda/compat.cuh", "core"),
    "cpu/cpu.cpp": ("cpu", "cuda/attention", "cuda/compat.cuh", "core", "backend.h"),
}
VENDOR = re.compile(r"^(cuda|hip|rocm|cooperative_groups|mma\.h|nv/|cub/|thrust/)")
TORCH = re.compile(r"^(torch|ATen|c10)/")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
VENDOR_CONDITION = re.compile(r"^\s*#\s*(?:el)?if.*\b(__CUDA\w*|__HIP\w*|__NVCC__|USE_ROCM)\b", re.MULTILINE)
MAY_ASK_FOR_VENDOR = ("cuda/compat.cuh", "cuda/sm80", "cuda/sm90", "hip")
SUFFIXES = (".h", ".cuh", ".cu", ".cpp", ".hip")


def layer_of(path: str) -> str | None:
    """The longest key of ALLOWED that `path`, relative to csrc, lies in."""
    matches = [layer for layer in ALLOWED if path == layer or path.startswith(f"{layer}/")]
    return max(matches, key=len, default=None)


def target_layer(csrc: Path, source: Path, name: str, is_quoted: bool) -> str | None:
    """What an include reaches: a layer, "torch", "vendor", "unknown", or None for the standard library."""
    if is_quoted:
        for base in (source.parent, csrc):
            reached = (base / name).resolve()
            if reached.is_file() and reached.is_relative_to(csrc):
                return layer_of(reached.relative_to(csrc).as_posix()) or "unknown"
    if TORCH.match(name):
        return "torch"
    if VENDOR.match(name):
        return "vendor"
    return "unknown" if is_quoted else None


def violations(csrc: Path) -> list[str]:
    """One line for every broken rule, empty when the house is in order."""
    csrc = csrc.resolve()
    found: list[str] = []
    for source in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        relative = source.relative_to(csrc).as_posix()
        layer = layer_of(relative)
        if layer is None:
            found.append(f"{relative}: in no layer (add it to tools/check_layering.py)")
            continue
        text = source.read_text()
        for match in INCLUDE.finditer(text):
            reached = target_layer(csrc, source, match.group(2), match.group(1) == '"')
            if reached is not None and reached != layer and reached not in ALLOWED[layer]:
                line = text.count("\n", 0, match.start(1)) + 1
                found.append(f"{relative}:{line}: {layer} may not include {match.group(2)} ({reached})")
        if not relative.startswith(MAY_ASK_FOR_VENDOR):
            for match in VENDOR_CONDITION.finditer(text):
                line = text.count("\n", 0, match.start(1)) + 1
                found.append(f"{relative}:{line}: {match.group(1)} outside compat.cuh and the arch folders")
    return found


def main() -> int:
    csrc = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "csrc"
    found = violations(csrc)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"layering: {len(found)} violations" if found else "layering: in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
