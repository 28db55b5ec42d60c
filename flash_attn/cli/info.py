"""What is installed, which devices are there, which modes are on and what they do here."""

import argparse
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flash_attn import __version__, _library, modes
from flash_attn.cli import devices

# What the performance mode does, where it does anything.
PERFORMANCE_MODE = (
    "off: all is rounded to nearest, products are in the inputs' dtype; "
    "on: float16 is multiplied in bfloat16, P and dS are narrowed toward zero"
)
DETERMINISTIC_MODE = {
    "cpu": "always holds here: blocks add to dQ in a fixed order, and keys are never split by heuristic",
    "cuda": "off: blocks add to dQ in any order, and decoding splits its keys to fill the GPU; on: neither",
    "hip": "off: blocks add to dQ in any order, and decoding splits its keys to fill the GPU; on: neither",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(_: argparse.Namespace) -> int:
    """Prints; 1 where the compiled library cannot be used, or a mode's variable is not understood."""
    line("flash_attn", f"{__version__} in {Path(__file__).resolve().parents[1]}")
    line("torch", f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    try:
        _library.require()
    except RuntimeError as error:
        print(f"\n{error}")
        return 1
    show_build(devices.build_info())
    backends = show_devices()
    try:
        show_modes(backends, os.environ, devices.build_info()["rtz"])
    except ValueError as error:  # a variable is set to nonsense
        print(error)
        return 1
    return 0


def line(label: str, text: str = "") -> None:
    """`label      text`"""
    print(f"{label:<14}{text}".rstrip())


def show_build(built: Mapping[str, Any]) -> None:
    """What the library was compiled for, and with."""
    print()
    if built["version"] != __version__:
        line("note", f"the library was built for version {built['version']}; rebuild with `pip install .`")
    for backend in built["backends"]:
        line("built for", f"{backend}: {', '.join(built['archs'][backend])}, with {built['compiler'][backend]}")
    kernels = ", ".join(f"{machine} {count}" for machine, count in built["instances"].items())
    line("kernels", kernels)
    line("built against", f"torch {built['torch_headers']}; sources {built['source_digest'][:12]}")
    line("RTZ code", "built (FLASH_ATTENTION_INTERNAL_USE_RTZ=1)" if built["rtz"] else "left out")


def show_devices() -> list[str]:
    """Every usable device with its key blocks; returns the backends in use."""
    print()
    backends = ["cpu"]
    found = [torch.device("cpu")]
    backend = devices.gpu_backend()
    if devices.has_gpu():
        backends.append(str(backend))
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in found:
        line(str(device), devices.describe(device))
    if backend is None and torch.cuda.is_available():
        line(
            "GPU",
            "torch sees one, but this build has CPU kernels only: rebuild with FLASH_ATTENTION_BACKEND=cuda or hip",
        )
    elif not torch.cuda.is_available():
        line("GPU", "none that torch can use" + ("" if backend is None else f" (kernels for {backend} are built)"))
    for device_type in dict.fromkeys(device.type for device in found):
        for dtype in devices.FLOAT_DTYPES[device_type]:
            line("key block", f"{device_type} {devices.dtype_name(dtype):<9} {key_blocks(device_type, dtype)}")
    return backends


def key_blocks(device_type: str, dtype: torch.dtype) -> str:
    """`128 keys up to head_dim 64, 64 up to 256`: what split_size must be a multiple of."""
    name = devices.dtype_name(dtype)
    spans: list[tuple[int, int]] = []  # keys, largest head_dim
    for head_dim in range(1, 257):
        try:
            keys = modes.key_block(device_type, name, head_dim)
        except (RuntimeError, ValueError):
            continue  # a build of a subset has no kernel for it
        if spans and spans[-1][0] == keys:
            spans.pop()
        spans.append((keys, head_dim))
    if not spans:
        return "no kernel in this build"
    return ", ".join(f"{keys} keys up to head_dim {last}" for keys, last in spans)


def show_modes(backends: list[str], environment: Mapping[str, str], has_rtz: bool) -> None:
    """The state of every mode, where it comes from, and what it means on this hardware."""
    print()
    mode = modes.get_deterministic_mode()
    split = "no split_size" if mode.split_size is None else f"split_size {mode.split_size}"
    line("deterministic", f"{on_or_off(modes.is_deterministic())} ({split})")
    line(
        "", f"set_deterministic_mode: {on_or_off(mode.enabled)}; {variable(modes.DETERMINISTIC_VARIABLE, environment)}"
    )
    for backend in backends:
        line("", f"{backend}: {DETERMINISTIC_MODE[backend]}")
    line("performance", on_or_off(modes.is_performance_mode()))
    line("", variable(modes.PERFORMANCE_VARIABLE, environment))
    for backend in backends:
        line("", f"{backend}: {performance_mode(backend, has_rtz)}")
    line("debug", f"{on_or_off(modes.is_debug())} (checks values on the GPU too, with a synchronisation in every call)")
    line("", variable(modes.DEBUG_VARIABLE, environment))


def performance_mode(backend: str, has_rtz: bool) -> str:
    """What the mode means there. It exists for hardware on which rounding to nearest costs instructions."""
    if backend == "cuda":
        return "changes nothing here: the hardware rounds to nearest for free"
    return PERFORMANCE_MODE if has_rtz else "left out of this build, calls in float16 and bfloat16 raise"


def on_or_off(state: bool) -> str:
    """`on`, `off`"""
    return "on" if state else "off"


def variable(name: str, environment: Mapping[str, str]) -> str:
    """`NAME=1`, `NAME is not set`"""
    return f"{name}={environment[name]}" if name in environment else f"{name} is not set"
