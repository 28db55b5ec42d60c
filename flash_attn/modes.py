"""Which guarantees the package gives: the deterministic mode and the performance mode.

Deterministic is on when any of these says so: the argument `deterministic=True`, `set_deterministic_mode(True)`, the
environment variable `FLASH_ATTENTION_INTERNAL_DETERMINISTIC=1`. It makes the backward repeat its bits (the forward
always does). A `split_size` adds schedule invariance: a query row's output and LSE then depend only on that row, the
keys and values it sees, the mask and `split_size`, so a whole prefill, a chunked prefill and a decode step agree bit
for bit.

The performance mode is on with `FLASH_ATTENTION_INTERNAL_PERFORMANCE_MODE=1`: AMD and CPU kernels then multiply float16
data in bfloat16, with float16 outputs, and narrow P and dS toward zero (docs/numerics.md). NVIDIA's do as ever.

The state belongs to the process, as that of `torch.use_deterministic_algorithms` does: autograd and data loaders use
threads of their own, and a mode that only the calling thread saw would be lost there. Set it from one thread while no
other runs attention. A forward records the mode for its own backward.

Under `torch.compile` the mode is guarded: changing it recompiles. Environment variables are read when a function is
traced, and a compiled function keeps what was read.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

DETERMINISTIC_VARIABLE = "FLASH_ATTENTION_INTERNAL_DETERMINISTIC"
PERFORMANCE_VARIABLE = "FLASH_ATTENTION_INTERNAL_PERFORMANCE_MODE"
DEBUG_VARIABLE = "FLASH_ATTENTION_INTERNAL_DEBUG"

_enabled: bool = False
_split_size: int = 0  # keys; 0: off


class DeterministicMode(NamedTuple):
    """What `set_deterministic_mode` was given last."""

    enabled: bool
    split_size: int | None  # keys in a chunk; None: forward and backward repeat, schedules may differ


def set_deterministic_mode(enabled: bool, split_size: int | None = None) -> None:
    """Turns the deterministic mode on or off for the process.

    Args:
        enabled: the backward repeats its bits, and a sequence's results do not depend on what else is in the batch.
        split_size: keys folded as one chunk, or None. A positive multiple of the key block that the kernel uses
            (`python -m flash_attn info` lists them; checked in each call, as the block depends on dtype and head
            dimension). 2048 suits every kernel.

    Raises:
        ValueError: split_size is not positive, or is given with enabled=False.
        TypeError: an argument has the wrong type.
    """
    global _enabled, _split_size
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: must be a bool, got {type(enabled).__name__} (pass True or False)")
    if split_size is not None:
        if isinstance(split_size, bool) or not isinstance(split_size, int):
            raise TypeError(f"split_size: must be an int or None, got {type(split_size).__name__} (pass e.g. 2048)")
        if split_size <= 0:
            raise ValueError(f"split_size: must be positive, got {split_size} (pass None to switch it off)")
        if not enabled:
            raise ValueError(f"split_size: must be None with enabled=False, got {split_size} (pass enabled=True)")
    _enabled = enabled
    _split_size = split_size or 0


def get_deterministic_mode() -> DeterministicMode:
    """The mode set by `set_deterministic_mode` (the environment variable is not part of it)."""
    return DeterministicMode(_enabled, _split_size or None)


@contextmanager
def deterministic_mode(enabled: bool = True, split_size: int | None = None) -> Iterator[None]:
    """Sets the deterministic mode for a `with` block and restores the former one afterwards.

    A backward run after the block still has the mode of its forward.
    """
    former = get_deterministic_mode()
    set_deterministic_mode(enabled, split_size)
    try:
        yield
    finally:
        set_deterministic_mode(*former)


def _is_set(variable: str) -> bool:
    """Whether a variable is 1. Whoever writes `true` means something, and must not be passed over in silence."""
    # Asked in every call, and os.environ takes a microsecond to say no: CPython's has a dict of bytes behind it.
    if variable.encode() not in getattr(os.environ, "_data", {variable.encode()}):
        return False
    value = os.environ.get(variable, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable}: must be 0 or 1, got {value!r} (set it to 1 to switch the mode on)")
    return value == "1"


def is_deterministic(requested: bool = False) -> bool:
    """Whether the backward must be deterministic: argument, mode or environment."""
    return requested or _enabled or _is_set(DETERMINISTIC_VARIABLE)


def is_performance_mode() -> bool:
    """Whether 16-bit data is multiplied in bf16 and narrowed toward zero (no effect where rounding costs nothing)."""
    return _is_set(PERFORMANCE_VARIABLE)


def is_debug() -> bool:
    """Whether values on the device are checked too, at the price of a synchronisation for each call."""
    return _is_set(DEBUG_VARIABLE)


@torch.compiler.assume_constant_result
def key_block(device_type: str, dtype: str, head_dim: int) -> int:
    """Keys in one block of the forward kernel for this device type ("cpu", "cuda"), dtype ("float16") and head_dim."""
    return torch.ops.flash_attn.key_block(device_type, dtype, head_dim)


def split_size_for(q: torch.Tensor) -> int:
    """The split size in force for queries like q, [..., head_dim]; 0 when off.

    Raises:
        ValueError: it is not a multiple of the kernel's key block, so schedule invariance could not be kept.
    """
    if _split_size == 0 or q.is_meta:  # no kernel runs on meta tensors
        return _split_size
    device_type, dtype, head_dim = q.device.type, str(q.dtype).removeprefix("torch."), q.shape[-1]
    block = key_block(device_type, dtype, head_dim)
    if _split_size % block:
        raise ValueError(
            f"split_size: must be a multiple of the key block, {block} for {dtype} with head_dim {head_dim} on "
            f"{device_type}, got {_split_size} (call set_deterministic_mode with such a multiple)"
        )
    return _split_size
