"""Fake kernels and autograd for the compiled operators, and the calls into them.

Shapes in this file: padded tensors are [batch, seq, heads, dim], packed ones [total, heads, dim]; softmax_lse and
delta are [batch, heads_q, seqlen_q] or [heads_q, total_q], in the accumulation dtype (float32, float64 for float64).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from flash_attn import _library


class Tensors(NamedTuple):
    """The optional tensor arguments that forward and backward share, in the operators' order."""

    cu_seqlens_q: Tensor | None = None  # int32 [batch + 1]
    cu_seqlens_k: Tensor | None = None  # int32 [batch + 1]
    seqused_k: Tensor | None = None  # int32 [batch]
    alibi_slopes: Tensor | None = None  # float32 [heads_q] or [batch, heads_q]
    sink: Tensor | None = None  # accumulation dtype [heads_q]
    rng_state: Tensor | None = None  # int64 [2]


class Options(NamedTuple):
    """The scalar arguments of the forward operator, in its order."""

    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    split_size: int = 0
    performance_mode: bool = False
    return_s_dmask: bool = False
    deterministic: bool = False

    @property
    def of_scores(self) -> tuple[int, int, float, int, int, float]:
        """max_seqlen_q to softcap, which all operators take in this order."""
        return self[:6]


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels accumulate in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def innermost_contiguous(x: Tensor) -> Tensor:
    """x itself where its last stride is 1, else a contiguous copy (a clone: contiguous() keeps odd unit strides)."""
    return x if x.stride()[-1] == 1 else x.clone(memory_format=torch.contiguous_format)


def empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of x: the layout of x where that keeps the last stride 1."""
    gradient = torch.empty_like(x)
    return gradient if gradient.stride(-1) == 1 else x.new_empty(x.shape)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: tuple[Tensor, ...],
    tensors: Tensors,
    options: Options,
) -> Tensor:
    """Calls flash_attn::backward, which writes `gradients` (dq, dk, dv); returns delta = rowsum(dout * out) - dlse."""
    if dlse is not None:
        dlse = dlse.to(softmax_lse.dtype).contiguous()
    return torch.ops.flash_attn.backward.default(
        innermost_contiguous(dout),
        dlse,
        q,
        k,
        v,
        innermost_contiguous(out),
        softmax_lse.contiguous(),
        *gradients,
        *tensors,
        *options.of_scores,
        options.dropout_p,
        options.deterministic,
        options.performance_mode,
    )


def sink_gradient(sink: Tensor, softmax_lse: Tensor, delta: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """d(loss)/d(sink), [heads_q]: minus the sum over rows of exp(sink - lse) * delta.

    The sink's probability in a row is p = exp(sink - lse), and d(s_ij)'s formula P * (dP - delta) holds for it with
    dP = 0, as it has no value vector. A sink of -inf is absent, and rows behind cu_seqlens_q[-1] are no one's.
    """
    logit = sink[:, None]  # [heads_q, 1]: rows are last in both layouts
    probability = torch.where(logit == -torch.inf, 0.0, torch.exp(logit - softmax_lse))
    rows = probability * delta
    if cu_seqlens_q is None:
        return -rows.sum(dim=(0, 2))
    row_index = torch.arange(rows.shape[1], device=rows.device)
    return -torch.where(row_index < cu_seqlens_q[-1], rows, 0.0).sum(dim=1)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    out, softmax_lse, s_dmask = output
    ctx.save_for_backward(q, k, v, out, softmax_lse, *rest[: len(Tensors._fields)])
    ctx.options = Options(*rest[len(Tensors._fields) :])
    ctx.mark_non_differentiable(s_dmask)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, softmax_lse, *rest = ctx.saved_tensors
    tensors = Tensors(*rest)
    dq, dk, dv = empty_gradient(q), empty_gradient(k), empty_gradient(v)
    dout = torch.zeros_like(out) if dout is None else dout
    delta = backward(dout, dlse, q, k, v, out, softmax_lse, (dq, dk, dv), tensors, ctx.options)
    gradients = dict.fromkeys(Tensors._fields)
    if tensors.sink is not None and ctx.needs_input_grad[3 + Tensors._fields.index("sink")]:
        gradients["sink"] = sink_gradient(tensors.sink, softmax_lse, delta, tensors.cu_seqlens_q)
    return dq, dk, dv, *gradients.values(), *(None for _ in Options._fields)


def _refuse_tangents(inputs: list[Tensor]) -> None:
    """Raises NotImplementedError under forward-mode differentiation, rather than give a derivative of zero."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "flash_attn has no forward-mode derivatives (differentiate in reverse mode, or use flash_attn.reference)"
        )


def _below_autograd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator where nothing is to be recorded.

    Its autograd is registered in Python, and stands in the way of every call: 6 of its 26 microseconds (torch 2.13).
    Tracing needs to see it. Finding the only overload would take another 12.
    """
    operator = torch.ops.flash_attn.forward.default
    if torch.compiler.is_compiling():
        return operator(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


class _Attention(torch.autograd.Function):
    """The operator with the formula that is registered for it, as a function of its own.

    The registered way serves callers of the operator; it parses the schema in every call, which took 70 of the 150
    microseconds of a small forward (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _below_autograd(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *gradients)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tensors: Tensors, options: Options, block_table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask). Differentiable in q, k, v and the sink.

    With block_table, int32 [batch, pages], k and v are pages, [num_blocks, page_size, heads_kv, dim]: read where they
    lie by kernels that can, elsewhere gathered. Packed, cu_seqlens_k has room for the longest sequence in each, or says
    without seqused_k how long they are.
    """
    inputs = [x for x in (q, k, v, tensors.sink) if x is not None]
    _refuse_tangents(inputs)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if block_table is not None:
        if not wants_gradient:
            # Traced as one operator: whether there is a kernel for these pages is known when it runs.
            attend = torch.ops.flash_attn.attend_pages.default if torch.compiler.is_compiling() else _attend_pages
            return attend(q, k, v, block_table, *tensors, *options)
        k, v, tensors = _gather(k, v, block_table, tensors, options)
    q, k, v = innermost_contiguous(q), innermost_contiguous(k), innermost_contiguous(v)
    run = _Attention.apply if wants_gradient else _below_autograd
    return run(q, k, v, *tensors, *options)


def _attend_pages(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """forward() of pages, without a gradient; `rest` as the forward operator takes it."""
    tensors, options = Tensors(*rest[: len(Tensors._fields)]), Options(*rest[len(Tensors._fields) :])
    q = innermost_contiguous(q)
    if k.stride(-1) == v.stride(-1) == 1 and options.dropout_p == 0.0:
        out, softmax_lse = torch.ops.flash_attn.forward_pages.default(
            q,
            k,
            v,
            innermost_contiguous(block_table),
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            tensors.seqused_k,
            tensors.alibi_slopes,
            tensors.sink,
            *options.of_scores,
            options.split_size,
            options.performance_mode,
            options.deterministic,
        )
        if out.numel():
            return out, softmax_lse, q.new_empty(0)
    k, v, tensors = _gather(k, v, block_table, tensors, options)
    return _below_autograd(q, innermost_contiguous(k), innermost_contiguous(v), *tensors, *options)


def _gather(
    k: Tensor, v: Tensor, block_table: Tensor, tensors: Tensors, options: Options
) -> tuple[Tensor, Tensor, Tensors]:
    """Copies of the keys and values in pages, padded or packed as the queries are, and where they are then."""
    k, v = (gather_pages(cache, block_table, options.max_seqlen_k) for cache in (k, v))
    if tensors.cu_seqlens_k is not None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        if tensors.seqused_k is None:
            starts = cumulative(tensors.cu_seqlens_k.shape[0] - 1, options.max_seqlen_k, k.device)
            tensors = tensors._replace(cu_seqlens_k=starts, seqused_k=tensors.cu_seqlens_k.diff())
    return k, v, tensors


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    queries_advance: bool,
) -> tuple[Tensor, Tensor]:
    """Calls flash_attn::append, which writes k and v into the cache; returns q, rotated, and the lengths afterwards.

    rotary is cos and sin, [seqlen_rotary, rotary_dim / 2], or None to rotate nothing. q's row i is rotated to position
    cache_seqlens + i, or without queries_advance to cache_seqlens. What lies outside the cache is not written.
    """
    cos = sin = None
    if rotary is not None:
        accum = accum_dtype(q.dtype)
        fits = rotary[0].dtype == rotary[1].dtype and rotary[0].dtype in (accum, q.dtype)
        cos, sin = (innermost_contiguous(x if fits else x.to(accum)) for x in rotary)
    caches = k_cache, v_cache
    dense = tuple(map(innermost_contiguous, caches))
    rotated, seqlens_after = torch.ops.flash_attn.append.default(
        innermost_contiguous(q),
        innermost_contiguous(k),
        innermost_contiguous(v),
        *dense,
        cache_seqlens,
        None if block_table is None else innermost_contiguous(block_table),
        cos,
        sin,
        interleaved,
        queries_advance,
    )
    for cache, written in zip(caches, dense, strict=True):
        if written is not cache:
            cache.copy_(written)
    return q if rotary is None else rotated, seqlens_after


def cumulative(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens, int32 [batch + 1], of sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def gather_pages(cache: Tensor, block_table: Tensor, seqlen: int) -> Tensor:
    """The first `seqlen` rows of every sequence, out of its pages: [batch, seqlen, heads, dim], a copy.

    cache is [num_blocks, page_size, heads, dim], block_table [batch, pages] with pages enough. Entries behind a
    sequence's end may hold anything; they are clamped into range, and the kernel never looks at what they bring.
    """
    position = torch.arange(seqlen, device=cache.device)
    page = block_table.long().clamp(0, cache.shape[0] - 1)[:, position // cache.shape[1]]
    return cache[page, position % cache.shape[1]]


class _PackedAttention(torch.autograd.Function):
    """Attention on `packed`, [..., 3, heads, dim] (q is None) or [..., 2, heads_kv, dim] beside q.

    The operator's own formula would give autograd three gradients to stack; here the kernel writes them into views
    of one tensor, so nothing is copied.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, packed: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors = Tensors(*rest[: len(Tensors._fields)])
        ctx.options = Options(*rest[len(Tensors._fields) :])
        parts = packed.unbind(-3)
        out, softmax_lse, s_dmask = _below_autograd(*(parts if q is None else (q, *parts)), *tensors, *ctx.options)
        ctx.save_for_backward(q, packed, out, softmax_lse, *tensors)
        ctx.mark_non_differentiable(s_dmask)
        ctx.set_materialize_grads(False)
        return out, softmax_lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, packed, out, softmax_lse, *rest = ctx.saved_tensors
        dpacked = empty_gradient(packed)
        parts, dparts = packed.unbind(-3), dpacked.unbind(-3)
        dq = None
        if q is not None:
            dq = empty_gradient(q)
            parts, dparts = (q, *parts), (dq, *dparts)
        q, k, v = parts
        dout = torch.zeros_like(out) if dout is None else dout
        backward(dout, dlse, q, k, v, out, softmax_lse, dparts, Tensors(*rest), ctx.options)
        return dq, dpacked, *(None for _ in range(len(Tensors._fields) + len(Options._fields)))


def packed_forward(
    q: Tensor | None, packed: Tensor, tensors: Tensors, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) of packed inputs, without copies in the forward or the backward."""
    _refuse_tangents([packed] if q is None else [q, packed])
    return _PackedAttention.apply(q, packed, *tensors, *options)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*rest[len(Tensors._fields) - 1 :])
    packed = cu_seqlens_q is not None
    heads_q = q.shape[-2]
    lse_shape = (heads_q, q.shape[0]) if packed else (q.shape[0], heads_q, q.shape[1])
    s_dmask_shape: tuple[Any, ...] = (0,)
    if options.return_s_dmask:
        batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
        s_dmask_shape = (batch, heads_q, options.max_seqlen_q, options.max_seqlen_k)
    out = q.new_empty(q.shape)
    return out, q.new_empty(lse_shape, dtype=accum_dtype(q.dtype)), q.new_empty(s_dmask_shape)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *rest: Any
) -> Tensor:
    return softmax_lse.new_empty(softmax_lse.shape)


def _fake_attend_pages(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_forward(q, k, v, *rest)


def _fake_append(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    cache_seqlens, rotary_cos = rest[4], rest[6]
    return q.new_empty(0 if rotary_cos is None else q.shape), cache_seqlens.new_empty(cache_seqlens.shape)


_PYTHON_OPERATORS = torch.library.Library("flash_attn", "FRAGMENT")


def _define_attend_pages() -> None:
    """flash_attn::attend_pages, for torch.compile: the forward operator's arguments, block_table behind v."""
    schema = str(torch.ops.flash_attn.forward.default._schema).removeprefix("flash_attn::forward")
    schema = schema.replace("Tensor v,", "Tensor v, Tensor block_table,", 1)
    _PYTHON_OPERATORS.define(f"attend_pages{schema}")
    _PYTHON_OPERATORS.impl("attend_pages", _attend_pages, "CompositeExplicitAutograd")
    torch.library.register_fake("flash_attn::attend_pages", _fake_attend_pages)


def register() -> None:
    """Attaches the fake kernels and the gradient to the loaded operators; called once, on import."""
    torch.library.register_fake("flash_attn::forward", _fake_forward)
    torch.library.register_fake("flash_attn::backward", _fake_backward)
    torch.library.register_fake("flash_attn::forward_pages", lambda q, *_: (q.new_empty(0), q.new_empty(0)))
    torch.library.register_fake("flash_attn::append", _fake_append)
    _define_attend_pages()
    torch.library.register_autograd("flash_attn::forward", _backward, setup_context=_setup_context)


if _library.load():
    register()
