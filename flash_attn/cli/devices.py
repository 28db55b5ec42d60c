"""What is built, what is present, and where to run."""

import argparse
import json
import os
import platform
from typing import Any

import torch

from flash_attn import _library

FLOAT_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`"""
    return str(dtype).removeprefix("torch.")


def build_info() -> dict[str, Any]:
    """What the compiled library says of itself: version, backends, archs, compiler, rtz, ..."""
    return json.loads(torch.ops.flash_attn.build_info())


def gpu_backend() -> str | None:
    """ "cuda" or "hip" where the library holds kernels for GPUs, else None."""
    return next((name for name in build_info()["backends"] if name != "cpu"), None)


def backend_of(device: torch.device) -> str:
    """ "cpu", "cuda" or "hip": whose kernels run there."""
    return "cpu" if device.type == "cpu" else str(gpu_backend())


def has_gpu() -> bool:
    """Whether kernels for a GPU are built and torch sees one."""
    return gpu_backend() is not None and torch.cuda.is_available()


def describe(device: torch.device) -> str:
    """One line: instruction set and threads, or the GPU's name and architecture."""
    return torch.ops.flash_attn.describe(device.type, device.index or 0)


def parse(name: str) -> torch.device:
    """The device called so; argparse shows the message of an error."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:1, got {name}") from None


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`"""
    parser.add_argument("--device", type=parse, help="cpu, cuda or cuda:1 (default: a GPU where there is one)")


def choose(asked: torch.device | None) -> torch.device:
    """The device to run on, made current.

    Raises:
        SystemExit: no library, no kernels built for what was asked, or torch sees no such device.
    """
    try:
        _library.require()
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    if asked is None:
        return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")
    if asked.type not in FLOAT_DTYPES:
        raise SystemExit(f"--device: must be cpu or cuda, got {asked.type}")
    if asked.type == "cuda":
        if not has_gpu():
            why = "this build has no GPU kernels" if gpu_backend() is None else "torch sees no GPU"
            raise SystemExit(f"--device: {asked} cannot be used, {why} (`python -m flash_attn info` says more)")
        asked = torch.device("cuda", torch.cuda.current_device() if asked.index is None else asked.index)
        torch.cuda.set_device(asked)
    return asked


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """For records of measurements: processor, cores, GPUs, versions."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "flash_attn": build_info(),
    }
