"""What the performance mode promises, for the CPU's tests and the emulator's: each check takes a way to run a call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import error, exact, gradients, largest, random_qkv, rounding
from torch import Tensor

from flash_attn.reference import attention_reference

BF16 = torch.bfloat16
UNIT = 2.0**-7  # of bf16, relative: what narrowing toward zero takes at most; to nearest takes half of it
DTYPES = (torch.float16, torch.bfloat16)


class Results(NamedTuple):
    """What a forward and its backward give."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


# run(performance_mode, q, k, v, dout, **arguments)
Run = Callable[..., Results]


def truncated(x: Tensor) -> Tensor:
    """Toward zero to bf16, in x's dtype."""
    return (x.float().view(torch.int32) & -0x10000).view(torch.float32).to(x.dtype)


def rounds_up(x: Tensor) -> Tensor:
    """Where rounding to nearest clearly differs from rounding toward zero."""
    rest = (x - truncated(x)).abs() / (torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent) * UNIT / 2)
    return (rest > 0.55) & (rest < 0.95)


def truncation(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, keep: Tensor | None = None, **arguments: Any) -> Results:
    """The most that narrowing P and dS toward zero takes from any element: a unit of each term of its sum.

    Padded tensors only. Derivatives of a softcap, at most 1, are left out: the bound is then loose.
    """
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    result = exact(q, k, v, **arguments)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scale = arguments.get("softmax_scale") or q.shape[-1] ** -0.5
    p, kept = result.probabilities, 1.0
    if keep is not None:
        kept = keep / (1.0 - arguments["dropout_p"])
    delta = (dout * result.out).sum(-1).transpose(1, 2)[..., None]
    ds = (p * (torch.einsum("bqhd,bkhd->bhqk", dout, values) * kept - delta)).abs()

    def sum_group(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, group)).sum(3)

    out = torch.einsum("bhqk,bkhd->bqhd", p * kept, values.abs())
    dq = scale * torch.einsum("bhqk,bkhd->bqhd", ds, keys.abs())
    dk = sum_group(scale * torch.einsum("bhqk,bqhd->bkhd", ds, q.abs()))
    dv = sum_group(torch.einsum("bhqk,bqhd->bkhd", p * kept, dout.abs()))
    return Results(*(UNIT * x for x in (out, torch.zeros_like(result.lse), dq, dk, dv)))


def assert_accurate(
    found: Results, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, keep: Tensor | None = None, **arguments: Any
) -> None:
    """The error is at most twice that of plain torch in bf16, plus four roundings there, plus the truncation."""
    masked = arguments if keep is None else {**arguments, "dropout_mask": keep}

    def results(dtype: torch.dtype) -> Results:
        inputs = tuple(x.detach().to(dtype).requires_grad_() for x in (q, k, v))
        reference = exact if dtype == torch.float64 else attention_reference
        result = reference(*inputs, **masked)
        return Results(result.out, result.lse, *gradients(result.out, inputs, dout.to(dtype)))

    plain, wanted, taken = results(BF16), results(torch.float64), truncation(q, k, v, dout, keep, **masked)
    # dP - delta is a difference of sums of `dim` products in fp32, and may be 0.
    difference = 2.0**-22 * (arguments.get("softmax_scale") or 1.0) * largest(dout) * largest(v)
    sums = {"dq": difference * largest(k), "dk": difference * largest(q)}
    for name, x, rough, right, most in zip(Results._fields, found, plain, wanted, taken, strict=True):
        limit = 2.0 * error(rough, right) + 4.0 * rounding(right, BF16) + largest(most) + sums.get(name, 0.0)
        assert error(x, right) <= limit, f"{name}: error {error(x, right):.3g}, limit {limit:.3g}"


def check_fp16_is_multiplied_in_bf16(run: Run) -> None:
    """Scores are those of the inputs rounded to bf16, to nearest, so the LSE has the same bits; not fp16's own."""
    q, k, v = random_qkv("cpu", torch.float16, 1, 70, 90, heads_q=2, heads_kv=1, dim=64)
    dout = torch.randn(q.shape).half()
    half = run(True, q, k, v, dout, causal=True)
    narrow = [x.to(BF16) for x in (q, k, v, dout)]
    for mode in (True, False):
        assert torch.equal(half.lse, run(mode, *narrow, causal=True).lse)
    assert not torch.equal(half.lse, run(False, q, k, v, dout, causal=True).lse)
    assert half.out.dtype == half.dq.dtype == torch.float16


def check_inputs_are_rounded_to_nearest(run: Run) -> None:
    """One key and a score of 0, so P is 1: out is v and dv is dout, as bf16 holds them; in fp16 as they are.

    Among them are denormal fp16 numbers, which bf16 holds as normal ones.
    """
    q, k, v = random_qkv("cpu", torch.float16, 1, 1, 1, heads_q=8, dim=64)
    dout = torch.randn(q.shape).half()
    for x in (v, dout):
        x[..., :8] *= 2.0**-17
    assert float((v != v.to(BF16).half()).float().mean()) > 0.5
    found = run(True, torch.zeros_like(q), k, v, dout)
    assert torch.equal(found.out, v.to(BF16).half()) and torch.equal(found.dv, dout.to(BF16).half())


def check_nans_stay(run: Run, signalling: bool = False) -> None:
    """Whatever their payload and sign, and infinities: narrowed inputs do not make numbers of them."""
    patterns = [0x7E00, 0x7FFF, -1, 0x7FF8, -0x200] + ([0x7C01, -0x3FF, 0x7DFF] if signalling else [])
    q, k, v = (torch.zeros(1, 1, 1, 64, dtype=torch.float16) for _ in range(3))
    v[..., : len(patterns)] = torch.tensor(patterns, dtype=torch.int16).view(torch.float16)
    v[..., -2], v[..., -1] = torch.inf, -torch.inf
    out = run(True, q, k, v, torch.zeros_like(q)).out.flatten()
    assert out[: len(patterns)].isnan().all() and out[-2] == torch.inf and out[-1] == -torch.inf


def check_p_is_truncated(run: Run, dtype: torch.dtype) -> None:
    """Row i sees a key with weight 1 and one with weight p_i, whose values in column i are -truncated(p_i) and 1.

    So out[i, i] is exactly 0 where p_i was narrowed toward zero, and above where it was rounded up.
    """
    scores = torch.arange(-2.0, -0.01, 1.0 / 64).double()
    p = scores.exp()
    chosen = rounds_up(p).nonzero().flatten()[:64]
    assert len(chosen) >= 32
    rows, scores, p = len(chosen), scores[chosen], p[chosen]
    q, k, v = (torch.zeros(1, n, 1, 64, dtype=dtype) for n in (rows, 2, 2))
    q[0, :, 0, 0] = 8 * scores  # the softmax scale is 1/8; k_0 = 0
    assert torch.equal(q[0, :, 0, 0].double(), 8 * scores)
    k[0, 1, 0, 0] = 1
    v[0, 0, 0, :rows], v[0, 1, 0, :rows] = -truncated(p), 1
    dout = torch.zeros_like(q)
    assert (run(True, q, k, v, dout).out[0, :, 0].diagonal() == 0).all()
    assert (run(False, q, k, v, dout).out[0, :, 0].diagonal() > 0).all()


def check_backward_is_truncated(run: Run, dtype: torch.dtype) -> None:
    """One query, two keys, dout a unit vector: dv is P, dk and dq are dS times powers of two, and nothing is added."""
    scores = torch.arange(-2.0, 2.0, 1.0 / 16).double()
    batch = len(scores)
    q, k, v = (torch.zeros(batch, n, 1, 64, dtype=dtype) for n in (1, 2, 2))
    q[:, 0, 0, 0], q[:, 0, 0, 1] = 8 * scores, 1
    k[:, 1, 0, 0] = 1
    v[:, 1, 0, 0] = 1.5
    dout = torch.zeros_like(q)
    dout[..., 0] = 1
    p = scores.sigmoid()
    for mode in (True, False):
        found = run(mode, q, k, v, dout)
        ds = p * (1.5 - found.out[:, 0, 0, 0].double())
        for x, got in ((p, found.dv[:, 1, 0, 0]), (ds, 8 * found.dk[:, 1, 0, 1]), (ds, 8 * found.dq[:, 0, 0, 0])):
            told = rounds_up(x)
            assert int(told.sum()) >= 12
            right = truncated(x) if mode else x.to(dtype)
            assert torch.equal(got[told].double(), right[told].double())
            assert not (truncated(x) == x.to(dtype).double())[told].any()


def large_gradients() -> tuple[Tensor, ...]:
    """fp16 q, k, v, dout whose gradients fp16 holds, where dS = P (dP - delta) is larger than it can."""
    q, k, v = random_qkv("cpu", torch.float16, 1, 40, 50, heads_q=1, dim=64)
    return q * 2.0**-7, k * 2.0**-7, v * 1000, (torch.randn(q.shape) * 1000).half()


def check_large_gradients(run: Run) -> None:
    """They overflow in fp16 and survive in the mode."""
    inputs = large_gradients()
    plain, found = run(False, *inputs), run(True, *inputs)
    assert not plain.dq.isfinite().all() and not plain.dk.isfinite().all()
    assert all(x.isfinite().all() for x in found)
    assert_accurate(found, *inputs)


def small_gradients(exponent: int) -> tuple[Tensor, ...]:
    """fp16 q, k, v, dout with a dQ that fp16 holds well. dO is about 2^exponent, dS less: fp16 is normal from 2^-14.

    K is large, as activations may be, and Q small.
    """
    q, k, v = random_qkv("cpu", torch.float16, 1, 40, 50, heads_q=1, dim=64)
    return q * 2.0**-8, k * 2.0**8, v, (torch.randn(q.shape) * 2.0**exponent).half()


def relative_error(found: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> float:
    """Of dQ, by norms."""
    inputs = tuple(x.double().requires_grad_() for x in (q, k, v))
    (wanted, *_) = gradients(exact(*inputs).out, inputs, dout.double())
    return float((found.double() - wanted).norm() / wanted.norm())
