"""Checks of what callers pass. Every message names the argument, what is wanted, what came, and a way out.

Nothing here reads device memory, so no check costs a synchronisation: the values of cu_seqlens, cache lengths and page
tables are looked at only where they lie on the CPU, or with FLASH_ATTENTION_INTERNAL_DEBUG=1. Kernels stay within the
tensors they are given whatever those values are.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _library, modes

MAX_HEAD_DIM = 256
# A window this wide sees every key; kernels add it to positions in 32 bits.
UNBOUNDED_WINDOW = 2**30

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(name: str, wanted: str, got: Any, fix: str) -> NoReturn:
    """Raises ValueError in the form that all checks share."""
    raise ValueError(f"{name}: {wanted}, got {got} ({fix})")


def fail_type(name: str, wanted: str, got: Any, fix: str) -> NoReturn:
    """Raises TypeError in the form that all checks share."""
    raise TypeError(f"{name}: must be {wanted}, got {type(got).__name__} ({fix})")


def tensor(name: str, x: Any, dims: Sequence[str]) -> torch.Size:
    """The shape of x, a strided tensor with as many dimensions as `dims` names."""
    if not isinstance(x, Tensor):
        fail_type(name, "a torch.Tensor", x, f"pass a tensor of shape [{', '.join(dims)}]")
    if x.layout != torch.strided:
        fail(name, "layout must be strided", x.layout, "call .to_dense()")
    shape = x.shape
    if len(shape) != len(dims):
        fail(name, f"must have {len(dims)} dimensions [{', '.join(dims)}]", f"shape {list(shape)}", "reshape it")
    return shape


def _float_input(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in DTYPES:
        fail(name, "dtype must be float16, bfloat16, float32 or float64", dtype, "convert with .to(dtype)")
    device_type = device.type
    if device_type not in _library.DEVICE_TYPES:
        built = ", ".join(sorted(_library.DEVICE_TYPES - {"meta"}))
        fail(name, f"device must be one this build has kernels for: {built}", device, "move it, or rebuild for it")
    if dtype == torch.float64 and device_type == "cuda":
        fail(name, "float64 runs on the CPU only", f"device {device}", "use float32 or move it to the CPU")


def _head_dim(name: str, shape: torch.Size) -> None:
    heads, head_dim = shape[-2:]
    if head_dim > MAX_HEAD_DIM:
        fail(name, f"head_dim must be at most {MAX_HEAD_DIM}", head_dim, "pad or split the heads")
    if head_dim < 1 or heads < 1:
        fail(name, "needs at least one head and one element in a head", f"shape {list(shape)}", "check the view")


_PADDED = ("batch", "seqlen", "heads", "head_dim")
_PACKED = ("total", "heads", "head_dim")
_PAGES = ("num_blocks", "page_size", "heads", "head_dim")


def qkv(q: Any, k: Any, v: Any, names: Sequence[str] = ("q", "k", "v"), packed: bool = False) -> None:
    """q [batch, seqlen_q, heads_q, dim] and k, v [batch, seqlen_k, heads_kv, dim]; packed: [total, heads, dim]."""
    dims = _PACKED if packed else _PADDED
    shapes = tensor(names[0], q, dims), tensor(names[1], k, dims), tensor(names[2], v, dims)
    if not packed and shapes[1][0] != shapes[0][0]:
        fail(names[1], f"batch must be that of {names[0]}, {shapes[0][0]}", shapes[1][0], "expand it")
    _all_alike((q, k, v), shapes, names)


def paged(q: Any, k: Any, v: Any, names: Sequence[str] = ("q", "k", "v"), packed: bool = False) -> None:
    """q as in `qkv`, k and v pages [num_blocks, page_size, heads_kv, dim]."""
    dims = _PACKED if packed else _PADDED
    shapes = tensor(names[0], q, dims), tensor(names[1], k, _PAGES), tensor(names[2], v, _PAGES)
    _all_alike((q, k, v), shapes, names)
    if shapes[1][0] < 1 or shapes[1][1] < 1:
        fail(names[1], "needs at least one page of at least one key", f"shape {list(shapes[1])}", "allocate the pages")


def _all_alike(qkv: Sequence[Tensor], shapes: Sequence[torch.Size], names: Sequence[str]) -> None:
    """What padded, packed and paged inputs share: dtypes, devices, head dimensions, heads."""
    # Every call pays for what it asks of a tensor, more so in a torch function mode: each thing once.
    dtype, device = qkv[0].dtype, qkv[0].device
    _float_input(names[0], dtype, device)
    _head_dim(names[0], shapes[0])
    head_dim = shapes[0][-1]
    for i in (1, 2):
        its_dtype, its_device = qkv[i].dtype, qkv[i].device
        if its_dtype != dtype:
            fail(names[i], f"dtype must be that of {names[0]}, {dtype}", its_dtype, "convert one of them")
        if its_device != device:
            fail(names[i], f"device must be that of {names[0]}, {device}", its_device, "move one of them")
        if shapes[i][-1] != head_dim:
            fail(names[i], f"head_dim must be that of {names[0]}, {head_dim}", shapes[i][-1], "pad the smaller one")
    if shapes[2] != shapes[1]:
        fail(names[2], f"shape must be that of {names[1]}, {list(shapes[1])}", list(shapes[2]), "check both views")
    heads(names[1], shapes[1][-2], shapes[0][-2])


def heads(name: str, heads_kv: int, heads_q: int) -> None:
    """heads_kv divides heads_q."""
    if heads_kv < 1 or heads_q % heads_kv:
        fail(name, f"its heads must divide the {heads_q} heads of q", heads_kv, "repeat or regroup the heads")


def packed_qkv(x: Any, name: str, slots: int, packed: bool) -> None:
    """x [batch, seqlen, slots, heads, dim], or [total, slots, heads, dim] when packed."""
    rows = ("total",) if packed else ("batch", "seqlen")
    tensor(name, x, (*rows, str(slots), "heads", "head_dim"))
    if x.shape[-3] != slots:
        fail(name, f"dimension -3 must be {slots}", f"shape {list(x.shape)}", "stack q, k, v along dimension -3")


def integer(name: str, x: Any, wanted: str, fix: str) -> int:
    """x as an int: numpy's are taken, bools are not."""
    if type(x) is int:  # in every call: the rest asks abstract classes
        return x
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt, Integral)):
        fail_type(name, wanted, x, fix)
    # Where torch.compile traces with dynamic shapes, an int is a torch.SymInt, and must stay one.
    return x if isinstance(x, torch.SymInt) else int(x)  # type: ignore[return-value]


def number(name: str, x: Any) -> float:
    """x as a finite float."""
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat, Real, Tensor)):
            fail_type(name, "a number", x, "pass a float")
        if isinstance(x, Tensor) and x.numel() != 1:
            fail(name, "must be a number", f"a tensor of shape {list(x.shape)}", "pass a float")
    value = float(x)
    if not -math.inf < value < math.inf:  # false for NaN too; math.isfinite cannot be traced
        fail(name, "must be finite", value, "check how it is computed")
    return value


def dropout(dropout_p: Any) -> float:
    """dropout_p in [0, 1)."""
    value = number("dropout_p", dropout_p)
    if not 0.0 <= value < 1.0:
        fail("dropout_p", "must be at least 0 and below 1", value, "pass the probability to drop")
    return value


def softcap(value: Any) -> float:
    """softcap, 0 (off) or positive."""
    value = number("softcap", value)
    if value < 0.0:
        fail("softcap", "must be 0 (off) or positive", value, "pass 0.0 to switch it off")
    return value


def window(window_size: Any, causal: bool) -> tuple[int, int]:
    """(left, right), each -1 (unbounded) or at least 0, with causal folded into right."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fail_type("window_size", "a pair (left, right)", window_size, "pass (-1, -1) for no window")
    left, right = window_size
    left, right = _window_bound("window_size left", left), _window_bound("window_size right", right)
    return left, 0 if causal else right


def _window_bound(name: str, bound: Any) -> int:
    bound = integer(name, bound, "an int", "pass -1 for no bound")
    if bound < -1:
        fail(name, "must be -1 (no bound) or at least 0", bound, "pass -1 for no bound")
    return -1 if bound >= UNBOUNDED_WINDOW else bound


def alibi(slopes: Any, q: Tensor, batch: int) -> Tensor | None:
    """ALiBi slopes, float32 [heads_q] or [batch, heads_q], innermost stride 1."""
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        fail_type("alibi_slopes", "a torch.Tensor or None", slopes, "pass a float32 tensor")
    if slopes.dtype != torch.float32:
        fail("alibi_slopes", "dtype must be torch.float32", slopes.dtype, "convert with .float()")
    if slopes.device != q.device:
        fail("alibi_slopes", f"device must be that of q, {q.device}", slopes.device, "move it")
    heads_q = q.shape[-2]
    if tuple(slopes.shape) not in ((heads_q,), (batch, heads_q)):
        wanted = f"shape must be [{heads_q}] or [{batch}, {heads_q}]"
        fail("alibi_slopes", wanted, list(slopes.shape), "one slope for each query head")
    if slopes.requires_grad and torch.is_grad_enabled():
        fail("alibi_slopes", "has no gradient", "requires_grad=True", "pass alibi_slopes.detach()")
    return slopes.contiguous()


def sink(s_aux: Any, q: Tensor) -> None:
    """Attention sinks, floating [heads_q]."""
    if s_aux is None:
        return
    if not isinstance(s_aux, Tensor):
        fail_type("s_aux", "a torch.Tensor or None", s_aux, "pass one logit for each query head")
    if not s_aux.is_floating_point():
        fail("s_aux", "dtype must be floating", s_aux.dtype, "convert with .float()")
    if s_aux.device != q.device:
        fail("s_aux", f"device must be that of q, {q.device}", s_aux.device, "move it")
    if s_aux.dim() != 1 or s_aux.shape[0] != q.shape[-2]:
        fail("s_aux", f"shape must be [{q.shape[-2]}]", list(s_aux.shape), "one logit for each query head")


def max_seqlen(name: str, x: Any) -> int:
    """A longest sequence as an int; a 0-d tensor is read (one synchronisation where it lies on a device)."""
    if isinstance(x, Tensor):
        if x.dim() != 0 or x.is_floating_point():
            fail(name, "must be an int or a 0-d integer tensor", f"{x.dtype} {list(x.shape)}", "pass int(x)")
        return int(x.item())
    fix = "pass the longest sequence's length"
    value = integer(name, x, "an int or a 0-d integer tensor", fix)
    if value < 0:
        fail(name, "must be at least 0", value, fix)
    return value


def int32_vector(name: str, x: Any, device: torch.device, length: int | None = None) -> Tensor:
    """An int32 tensor [length] on `device`, contiguous."""
    if not isinstance(x, Tensor):
        fail_type(name, "a torch.Tensor", x, "pass an int32 tensor")
    if x.dtype != torch.int32:
        fail(name, "dtype must be torch.int32", x.dtype, "convert with .int()")
    if x.device != device:
        fail(name, f"device must be that of q, {device}", x.device, "move it")
    if x.dim() != 1 or (length is not None and x.shape[0] != length):
        wanted = "n" if length is None else str(length)
        fail(name, f"shape must be [{wanted}]", list(x.shape), "one entry for each sequence")
    return x.contiguous()


def values_are_readable(x: Tensor) -> bool:
    """Whether looking at x's values is free (a real CPU tensor) or asked for."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    return x.is_cpu or modes.is_debug()


def cu_seqlens(name: str, x: Any, device: torch.device, total: int | None, longest: int) -> Tensor:
    """Cumulative lengths [batch + 1]: 0 first, never falling, the last at most `total`, no step above `longest`.

    Rows from the last entry on belong to no sequence: their output is 0.
    """
    x = int32_vector(name, x, device)
    if x.shape[0] < 1:
        fail(name, "needs batch + 1 entries", 0, "a batch of no sequences is [0]")
    if not values_are_readable(x):
        return x
    values = x.tolist()
    if values[0] != 0:
        fail(name, "must start with 0", values[0], "build it with a leading zero")
    steps = [after - before for before, after in pairwise(values)]
    if any(step < 0 for step in steps):
        fail(name, "must not decrease", values, "pass cumulative lengths, not lengths")
    if total is not None and values[-1] > total:
        fail(name, f"last entry must be at most the {total} rows there are", values[-1], "check the lengths")
    if steps and max(steps) > longest:
        fail(f"max_seqlen of {name}", f"must be at least the longest sequence, {max(steps)}", longest, "raise it")
    return x


def in_range(name: str, x: Tensor, low: int, high: int, fix: str) -> None:
    """low <= x <= high in every entry, where x may be read."""
    if x.numel() and values_are_readable(x):
        least, most = int(x.min()), int(x.max())
        if least < low or most > high:
            fail(name, f"entries must lie in [{low}, {high}]", f"[{least}, {most}]", fix)


def rotary_tables(cos: Any, sin: Any, x: Tensor, names: tuple[str, str] = ("cos", "sin")) -> None:
    """Both tables, floating [seqlen_rotary, rotary_dim / 2] on x's device, with rotary_dim at most x's head_dim."""
    for name, table in zip(names, (cos, sin), strict=True):
        tensor(name, table, ("seqlen_rotary", "rotary_dim / 2"))
        if not table.is_floating_point():
            fail(name, "dtype must be floating", table.dtype, "convert with .float()")
        if table.device != x.device:
            fail(name, f"device must be that of the rotated tensor, {x.device}", table.device, "move it")
    if cos.shape != sin.shape:
        fail(names[1], f"shape must be that of {names[0]}, {list(cos.shape)}", list(sin.shape), "pass both tables")
    if 2 * cos.shape[1] > x.shape[-1]:
        wanted = f"rotary_dim must be at most head_dim, {x.shape[-1]}"
        fail(names[0], wanted, 2 * cos.shape[1], "cut the table")


def gpu_generator(name: str, generator: Any) -> None:
    """A torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        fail_type(name, "a torch.Generator or None", generator, "pass None for the default generator")
