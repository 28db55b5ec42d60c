"""Compares the kernels, forward and backward, with the float64 reference over a table of features."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, modes
from flash_attn.cli.devices import backend_of
from flash_attn.reference import AttentionResult, attention_reference

# Contract (docs/numerics.md): largest forward error of float32 where unit-normal rows see all of many keys.
FLOAT32_FORWARD_LIMIT = 1e-6


class Case(NamedTuple):
    """One row of the table: a problem with unit-normal inputs."""

    name: str
    batch: int = 2
    seqlen_q: int = 113
    seqlen_k: int = 203
    heads_q: int = 4
    heads_kv: int = 2
    dim: int = 64
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: str = ""  # "heads" or "batch": the shape of the slopes
    sink: bool = False
    dropout_p: float = 0.0
    lse_gradient: bool = False  # the loss uses the LSE as well as the output
    packed: tuple[tuple[int, int], ...] = ()  # lengths (queries, keys) of the sequences of a packed batch
    interleaved: bool = False  # q, k, v are views of one tensor, not contiguous

    @property
    def is_plain(self) -> bool:
        """Every query sees every key, nothing is modified: what the float32 contract speaks of."""
        changed = (self.causal, self.window_size != (-1, -1), self.softmax_scale, self.softcap, self.alibi, self.sink)
        return not any((*changed, self.dropout_p, self.packed))


FEATURES = (
    Case("full"),
    Case("causal", causal=True),
    Case("causal, more queries than keys", seqlen_q=203, seqlen_k=113, causal=True),
    Case("sliding window", window_size=(40, 9)),
    Case("causal sliding window", causal=True, window_size=(64, 0)),
    Case("grouped heads 6/2", heads_q=6, causal=True),
    Case("multi-query heads 4/1", heads_kv=1),
    Case("packed, causal", packed=((70, 150), (3, 64), (0, 9), (31, 31)), causal=True),
    Case("views of one qkv tensor", seqlen_q=113, seqlen_k=113, heads_kv=4, interleaved=True, causal=True),
    Case("softmax scale", softmax_scale=0.3),
    Case("softcap", softcap=5.0, causal=True),
    Case("ALiBi", alibi="heads", causal=True),
    Case("ALiBi for each sequence", alibi="batch"),
    Case("attention sinks", sink=True, causal=True),
    Case("dropout, mask from S_dmask", dropout_p=0.25, causal=True),
    Case("gradient of the LSE", lse_gradient=True, causal=True),
    Case("everything", window_size=(90, 0), softcap=5.0, alibi="heads", sink=True, dropout_p=0.25, lse_gradient=True),
)
HEAD_DIMS = tuple(Case(f"head_dim {dim}", dim=dim) for dim in (8, 33, 96, 128, 192, 256))


class Comparison(NamedTuple):
    """One tensor: its largest absolute error and what is allowed."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN


class Problem(NamedTuple):
    """Inputs of a case, and the arguments that the kernels and the reference share."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    arguments: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.sink) if x is not None]

    def converted(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype, as new leaves."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        sink = None if self.sink is None else self.sink.detach().to(accumulation_dtype(dtype)).requires_grad_()
        return Problem(q, k, v, sink, self.arguments)


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """Draws the inputs, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch = len(case.packed) if case.packed else case.batch
    rows_q = (sum(n for n, _ in case.packed),) if case.packed else (case.batch, case.seqlen_q)
    rows_k = (sum(n for _, n in case.packed),) if case.packed else (case.batch, case.seqlen_k)
    if case.interleaved:
        packed = draw(*rows_q, 3, case.heads_q, case.dim).to(device, dtype)
        q, k, v = (part.requires_grad_() for part in packed.unbind(-3))
    else:
        q = draw(*rows_q, case.heads_q, case.dim).to(device, dtype).requires_grad_()
        k, v = (draw(*rows_k, case.heads_kv, case.dim).to(device, dtype).requires_grad_() for _ in range(2))
    sink = draw(case.heads_q).to(device, accumulation_dtype(dtype)).requires_grad_() if case.sink else None
    arguments: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window_size,
        "softmax_scale": case.softmax_scale,
        "softcap": case.softcap,
    }
    if case.alibi:
        shape = (batch, case.heads_q) if case.alibi == "batch" else (case.heads_q,)
        arguments["alibi_slopes"] = torch.rand(shape, generator=generator).mul(0.3).to(device)
    if case.packed:
        for name, lengths in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*case.packed, strict=True), strict=True):
            ends = torch.tensor([0, *lengths], dtype=torch.int32)
            arguments[name] = ends.cumsum(0, dtype=torch.int32).to(device)
    return Problem(q, k, v, sink, arguments)


def run_kernels(case: Case, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, S_dmask) by the public functions."""
    arguments = problem.arguments | {"dropout_p": case.dropout_p, "s_aux": problem.sink, "return_attn_probs": True}
    if not case.packed:
        return flash_attn_func(problem.q, problem.k, problem.v, **arguments)
    longest_q, longest_k = (max(lengths) for lengths in zip(*case.packed, strict=True))
    arguments |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    return flash_attn_varlen_func(problem.q, problem.k, problem.v, **arguments)


def run_reference(case: Case, problem: Problem, keep: Tensor | None) -> AttentionResult:
    """The definition in the inputs' dtype, with the kernels' dropout mask."""
    arguments = problem.arguments | {"s_aux": problem.sink}
    if keep is not None:
        arguments |= {"dropout_p": case.dropout_p, "dropout_mask": keep}
    if problem.q.dtype == torch.float64:
        arguments = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()
        }
    return attention_reference(problem.q, problem.k, problem.v, **arguments)


def gradients(case: Case, out: Tensor, lse: Tensor, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Gradients of sum(dout * out), and of sum(dlse * lse) where the case has it."""
    outputs = [out, lse] if case.lse_gradient else [out]
    given = [x.to(y.dtype) for x, y in zip(upstream, outputs, strict=False)]
    return list(torch.autograd.grad(outputs, leaves, given))


def check(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Runs forward and backward; yields the comparison of out, lse, dq, dk, dv and, with a sink, dsink."""
    torch.manual_seed(0)
    problem = make(case, dtype, device)
    out, lse, s_dmask = run_kernels(case, problem)
    keep = ~torch.signbit(s_dmask) if case.dropout_p > 0.0 else None
    wide, multiplied = problem.converted(torch.float64), problem.converted(product_dtype(dtype, device))
    plain, exact = run_reference(case, multiplied, keep), run_reference(case, wide, keep)
    upstream = [torch.randn(x.shape).to(x) for x in (out, lse)]

    scores = largest(exact.lse)  # an error of a score, which grows with the scores, is a relative error of the output
    contract = dtype == torch.float32 and case.is_plain
    slack = 2.0 if is_truncated(dtype, device) else 1.0
    yield compare("out", out, plain.out, exact.out, scores * largest(exact.out), slack, contract)
    yield compare("lse", lse, plain.lse, exact.lse, scores, slack)
    found = gradients(case, out, lse, problem.leaves, upstream)
    rough = gradients(case, plain.out, plain.lse, multiplied.leaves, upstream)
    wanted = gradients(case, exact.out, exact.lse, wide.leaves, upstream)
    terms = gradient_terms(case, multiplied, upstream[0], exact.out, wanted)
    names = ("dq", "dk", "dv", "dsink")
    for row in zip(names, found, rough, wanted, terms, strict=False):
        yield compare(*row, slack)


def gradient_terms(case: Case, problem: Problem, dout: Tensor, out: Tensor, wanted: list[Tensor]) -> list[float]:
    """The size of what is added up in each gradient.

    dS = P * (dP - delta) is a difference of sums over dim products dout * v; an error of a score is a relative error
    of P, and so of everything. The sink's gradient adds up delta = rowsum(dout * out) over a head's rows, where out has
    been rounded to its dtype: independent errors, so they grow with the root of their number.
    """
    q, k, v = (largest(x) for x in (problem.q, problem.k, problem.v))
    scale = case.dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    difference = case.dim**0.5 * largest(dout) * v / (1.0 - case.dropout_p)
    score = scale * case.dim**0.5 * q * k
    sizes = [scale * difference * k, scale * difference * q, 0.0]
    terms = [size + score * largest(gradient) for size, gradient in zip(sizes, wanted, strict=False)]
    deltas = float(dout.double().square().mean().sqrt() * out.detach().norm()) / case.heads_q**0.5
    dtype = problem.q.dtype
    return [*terms, deltas * torch.finfo(dtype).eps / torch.finfo(accumulation_dtype(dtype)).eps]


def is_truncated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether P and dS are narrowed toward zero: in the performance mode, where it changes anything."""
    return modes.is_performance_mode() and dtype in (torch.float16, torch.bfloat16) and backend_of(device) != "cuda"


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What factors are rounded to: the inputs' dtype, bfloat16 in the performance mode."""
    return torch.bfloat16 if is_truncated(dtype, device) else dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def compare(
    name: str,
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    terms: float,
    slack: float = 1.0,
    contract: bool = False,
) -> Comparison:
    """The error may be twice that of plain torch at the same precision, plus a floor; see docs/numerics.md.

    The floor is four roundings of the largest value, since plain torch may be exact by luck on small shapes, and four
    roundings in the accumulation dtype of `terms`. In float64 the exact answer was itself computed with such errors:
    the floor is eight times as high. `slack` multiplies the limit: 2 where narrowing takes up to a whole unit in the
    last place, not half of one. With `contract` the limit is FLOAT32_FORWARD_LIMIT instead.
    """
    if contract:
        return Comparison(name, error(actual, exact), FLOAT32_FORWARD_LIMIT)
    floor = 2.0 * torch.finfo(plain.dtype).eps * largest(exact)
    floor += 2.0 * torch.finfo(accumulation_dtype(plain.dtype)).eps * terms
    floor *= 8.0 if plain.dtype == torch.float64 else 1.0
    return Comparison(name, error(actual, exact), slack * (2.0 * error(plain, exact) + floor))


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinities must agree, and NaN is infinitely wrong."""
    actual, exact = actual.detach().double(), exact.detach().double()
    if actual.shape != exact.shape:
        return torch.inf
    difference = (actual - exact).abs().masked_fill(actual == exact, 0.0).nan_to_num(nan=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def largest(x: Tensor) -> float:
    """The largest finite magnitude, 0 for nothing."""
    x = x.detach().double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0
