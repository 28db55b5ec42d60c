"""Inputs, features and error bounds that the tests share."""

import json
from typing import Any

import torch
from torch import Tensor

from flash_attn import _library
from flash_attn.reference import AttentionResult, attention_reference


def _devices() -> list[str]:
    if _library.problem() is not None:
        return ["cpu"]  # each test then fails with what to do; tests of the build itself need no library
    built = json.loads(torch.ops.flash_attn.build_info())["backends"]
    has_gpu_kernels = any(backend in built for backend in ("cuda", "hip"))
    return ["cpu", "cuda"] if has_gpu_kernels and torch.cuda.is_available() else ["cpu"]


DEVICES = _devices()
FLOAT_DTYPES = {
    "cpu": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}


def random_qkv(
    device: str,
    dtype: torch.dtype,
    batch: int = 2,
    seqlen_q: int = 37,
    seqlen_k: int | None = None,
    heads_q: int = 4,
    heads_kv: int | None = None,
    dim: int = 64,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-normal q, k, v, drawn on the CPU so that every device sees the same numbers."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_kv = heads_q if heads_kv is None else heads_kv
    shapes = (batch, seqlen_q, heads_q, dim), *([(batch, seqlen_k, heads_kv, dim)] * 2)
    q, k, v = (torch.randn(shape).to(device, dtype).requires_grad_(grad) for shape in shapes)
    return q, k, v


def rising_scores(
    device: str, dtype: torch.dtype, dim: int, seqlen_q: int = 200, seqlen_k: int = 450, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose rows find ever larger scores, up to about 12; all of every fifth row's are lower by 12."""
    q, k, v = random_qkv(device, torch.float32, 1, seqlen_q, seqlen_k, heads_q=2, heads_kv=1, dim=dim)
    k *= torch.linspace(0.1, 4, seqlen_k, device=k.device)[:, None, None]
    k[..., 0], q[..., 0] = 8.0, 0.0
    q[:, ::5, :, 0] = -1.5 * dim**0.5
    q, k, v = (x.to(dtype).requires_grad_(grad) for x in (q, k, v))
    return q, k, v


# Keyword arguments of the public functions and of the reference alike.
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "window_left": {"window_size": (5, -1)},
    "window_right": {"window_size": (-1, 3)},
    "causal_window": {"causal": True, "window_size": (12, 12)},
    "scale": {"softmax_scale": 0.4},
    "softcap": {"softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": "heads"},
    "alibi_batch": {"alibi_slopes": "batch"},
    "sink": {"s_aux": True},
    "everything": {
        "causal": True,
        "window_size": (20, 0),
        "softcap": 3.0,
        "alibi_slopes": "heads",
        "s_aux": True,
        "softmax_scale": 0.3,
    },
}


def feature(name: str, q: Tensor, batch: int | None = None) -> dict[str, Any]:
    """FEATURES[name] with its tensors made for q; batch for packed q."""
    arguments = dict(FEATURES[name])
    heads = q.shape[-2]
    batch = q.shape[0] if batch is None else batch
    generator = torch.Generator().manual_seed(1)
    if "alibi_slopes" in arguments:
        shape = (heads,) if arguments["alibi_slopes"] == "heads" else (batch, heads)
        arguments["alibi_slopes"] = torch.rand(shape, generator=generator).mul(0.3).to(q.device)
    if "s_aux" in arguments:
        arguments["s_aux"] = torch.randn(heads, generator=generator).to(q.device)
    return arguments


def exact(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> AttentionResult:
    """The answer in float64."""
    arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return attention_reference(q.double(), k.double(), v.double(), **arguments)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinities must agree, NaN is infinitely wrong."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    same = actual == expected
    difference = (actual - expected).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(nan=torch.inf).max())


def rounding(expected: Tensor, dtype: torch.dtype) -> float:
    """What rounding the exact answer to dtype may cost: half a unit in the last place of the largest value."""
    finite = expected.detach().double()
    finite = finite[finite.isfinite()]
    return 0.5 * torch.finfo(dtype).eps * float(finite.abs().max()) if finite.numel() else 0.0


def assert_accurate(actual: Tensor, plain: Tensor, expected: Tensor, what: str = "out", terms: float = 0.0) -> None:
    """The error is at most twice that of plain torch at the same precision, plus a floor.

    The floor is four roundings of the largest value, since plain torch may be exact by luck on small shapes while a
    kernel rounds P (or dS), the product and the result, each in an order of its own; and four roundings, in the
    accumulation dtype, of `terms`, the size of what is added up where the result is a small difference. In float64
    the expected answer was itself computed with such errors, in another order: the floor is then eight times as high.
    """
    accum = torch.promote_types(plain.dtype, torch.float32)
    floor = 4.0 * rounding(expected, plain.dtype) + 2.0 * torch.finfo(accum).eps * terms
    limit = 2.0 * error(plain, expected) + floor * (8.0 if plain.dtype == torch.float64 else 1.0)
    assert error(actual, expected) <= limit, f"{what}: error {error(actual, expected):.3g}, limit {limit:.3g}"


def largest(x: Tensor) -> float:
    """The largest finite magnitude, 0 for nothing."""
    x = x.detach().double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def assert_forward_accurate(actual: tuple[Tensor, Tensor], plain: AttentionResult, expected: AttentionResult) -> None:
    """Compares out and LSE. An error of a score, which grows with the scores, is a relative error of the output."""
    scores = largest(expected.lse)
    assert_accurate(actual[0], plain.out, expected.out, terms=scores * largest(expected.out))
    assert_accurate(actual[1], plain.lse, expected.lse, "lse", terms=scores)


def assert_gradients_accurate(
    actual: list[Tensor],
    plain: list[Tensor],
    expected: list[Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    softmax_scale: float | None = None,
) -> None:
    """Compares dq, dk, dv.

    dS = P * (dP - delta) is a difference of two sums over dim products dout * v. An error of a score, which grows with
    the scores, is a relative error of P and so of everything.
    """
    q, k, v = inputs
    dim = q.shape[-1]
    scale = dim**-0.5 if softmax_scale is None else abs(softmax_scale)
    difference = dim**0.5 * largest(dout) * largest(v)
    score = scale * dim**0.5 * largest(q) * largest(k)
    terms = (scale * difference * largest(k), scale * difference * largest(q), 0.0)
    for name, got, rough, wanted, size in zip(("dq", "dk", "dv"), actual, plain, expected, terms, strict=True):
        assert got.dtype == q.dtype
        assert_accurate(got, rough, wanted, name, size + score * largest(wanted))


def gradients(outputs: Tensor | tuple[Tensor, ...], inputs: tuple[Tensor, ...], *upstream: Tensor) -> list[Tensor]:
    """Gradients with zeros where there is no path."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, inputs, strict=True)]


def cumulative(lengths: list[int], device: str) -> Tensor:
    """cu_seqlens of sequences with these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def random_packed(
    device: str,
    dtype: torch.dtype,
    lengths_q: list[int],
    lengths_k: list[int],
    heads_q: int = 4,
    heads_kv: int = 2,
    dim: int = 64,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Packed q, k, v and the keyword arguments that say where the sequences lie."""
    q = torch.randn(sum(lengths_q), heads_q, dim).to(device, dtype).requires_grad_(grad)
    k, v = (torch.randn(sum(lengths_k), heads_kv, dim).to(device, dtype).requires_grad_(grad) for _ in range(2))
    where = {"cu_seqlens_q": cumulative(lengths_q, device), "cu_seqlens_k": cumulative(lengths_k, device)}
    return q, k, v, where


def longest(lengths_q: list[int], lengths_k: list[int]) -> dict[str, int]:
    """max_seqlen arguments."""
    return {"max_seqlen_q": max(lengths_q, default=0), "max_seqlen_k": max(lengths_k, default=0)}
