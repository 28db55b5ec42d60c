"""The functions underneath: what clients that keep their own autograd call.

Signatures and result orders are those of the flash-attn package, 2.8.3, down to the positional arguments of its
compiled module (`flash_attn_gpu`, also importable as `flash_attn_2_cuda`). They run wherever their tensors are.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from flash_attn import _checks as check
from flash_attn import _library, _ops
from flash_attn import _prepare as prepare
from flash_attn._kvcache import flash_attn_with_kvcache
from flash_attn._ops import innermost_contiguous


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of padded sequences; rng_state regenerates the dropout."""
    window = (window_size_left, window_size_right)
    return _padded_forward(
        q, k, v, alibi_slopes, dropout_p, softmax_scale, causal, window, softcap, return_softmax, None
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed sequences; out is written in full, so zero_tensors is moot."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table)
    window = (window_size_left, window_size_right)
    return _packed_forward(
        q, k, v, lengths, alibi_slopes, dropout_p, softmax_scale, causal, window, softcap, return_softmax, None
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk, dv (where given) and returns softmax_d = rowsum(dout * out), [batch, heads_q, seqlen_q]."""
    return bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        alibi_slopes,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        None,
        rng_state,
    )[3]


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk, dv (where given) and returns softmax_d = rowsum(dout * out), [heads_q, total_q]."""
    return varlen_bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        zero_tensors,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        None,
        rng_state,
    )[3]


# flash-attn wraps these in custom operators for torch.compile; here the operators lie one level deeper.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _padded_forward(
    q, k, v, alibi_slopes, dropout_p, softmax_scale, causal, window, softcap, return_softmax, generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _library.require()
    check.qkv(q, k, v)
    options = prepare.options(
        q,
        q.shape[1],
        k.shape[1],
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window,
        softcap=softcap,
        return_attn_probs=return_softmax,
    )
    tensors = prepare.tensors(q, q.shape[0], options.dropout_p, alibi_slopes=alibi_slopes, generator=generator)
    return _run_forward(q, k, v, tensors, options)


def _packed_forward(
    q, k, v, lengths, alibi_slopes, dropout_p, softmax_scale, causal, window, softcap, return_softmax, generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _library.require()
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table = lengths
    if leftpad_k is not None:
        check.fail("leftpad_k", "is not supported for packed keys", "a tensor", "start cu_seqlens_k behind the padding")
    max_seqlen_q = check.max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check.max_seqlen("max_seqlen_k", max_seqlen_k)
    k, v, where = prepare.sequences(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    options = prepare.options(
        q,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window,
        softcap=softcap,
        return_attn_probs=return_softmax,
    )
    tensors = prepare.tensors(q, where.batch, options.dropout_p, *where, alibi_slopes=alibi_slopes, generator=generator)
    return _run_forward(q, k, v, tensors, options)


def _run_forward(q, k, v, tensors: _ops.Tensors, options: _ops.Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = innermost_contiguous(q), innermost_contiguous(k), innermost_contiguous(v)
    out, softmax_lse, s_dmask = _ops.forward(q, k, v, tensors, options)
    rng_state = tensors.rng_state
    if rng_state is None:  # clients save it whether or not there is dropout
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return out, softmax_lse, s_dmask, rng_state


def _run_backward(
    dout, q, k, v, out, softmax_lse, gradients, tensors: _ops.Tensors, options: _ops.Options
) -> list[Tensor]:
    """Writes into `gradients`; one that is missing or whose last stride is not 1 is written elsewhere first."""
    q, k, v = innermost_contiguous(q), innermost_contiguous(k), innermost_contiguous(v)
    for name, gradient, like in zip(("dq", "dk", "dv"), gradients, (q, k, v), strict=True):
        if gradient is not None and (gradient.shape != like.shape or gradient.dtype != like.dtype):
            wanted = f"must be {like.dtype} {list(like.shape)} like {name[1:]}"
            check.fail(name, wanted, f"{gradient.dtype} {list(gradient.shape)}", "allocate it so")
    written = tuple(
        gradient if gradient is not None and gradient.stride(-1) == 1 else _ops.empty_gradient(like)
        for gradient, like in zip(gradients, (q, k, v), strict=True)
    )
    delta = _ops.backward(dout, None, q, k, v, out, softmax_lse, written, tensors, options)
    results = []
    for gradient, result in zip(gradients, written, strict=True):
        results.append(result if gradient is None or gradient is result else gradient.copy_(result))
    return [*results, delta]


def _backward_tensors(q, batch, dropout_p, alibi_slopes, rng_state, *where) -> _ops.Tensors:
    if dropout_p > 0.0 and rng_state is None:
        check.fail("rng_state", "must be what the forward returned when dropout_p > 0", None, "pass it on")
    tensors = prepare.tensors(q, batch, 0.0, *where, alibi_slopes=alibi_slopes)
    return tensors._replace(rng_state=rng_state if dropout_p > 0.0 else None)


def _copied_into(out: Tensor | None, result: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    return list(result) if out is None else [out.copy_(result[0]), *result[1:]]


def fwd(
    q,
    k,
    v,
    out,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    return_softmax,
    generator,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of padded sequences."""
    check.gpu_generator("generator", generator)
    window = (window_size_left, window_size_right)
    result = _padded_forward(
        q, k, v, alibi_slopes, p_dropout, softmax_scale, is_causal, window, softcap, return_softmax, generator
    )
    return _copied_into(out, result)


def varlen_fwd(
    q,
    k,
    v,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    leftpad_k,
    block_table,
    alibi_slopes,
    max_seqlen_q,
    max_seqlen_k,
    p_dropout,
    softmax_scale,
    zero_tensors,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    return_softmax,
    generator,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences."""
    check.gpu_generator("generator", generator)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table)
    window = (window_size_left, window_size_right)
    result = _packed_forward(
        q, k, v, lengths, alibi_slopes, p_dropout, softmax_scale, is_causal, window, softcap, return_softmax, generator
    )
    return _copied_into(out, result)


def bwd(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    deterministic,
    generator,
    rng_state,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of padded sequences; the generator is not needed, rng_state is."""
    _library.require()
    check.qkv(q, k, v)
    options = prepare.options(
        q,
        q.shape[1],
        k.shape[1],
        dropout_p=p_dropout,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        deterministic=deterministic,
    )
    tensors = _backward_tensors(q, q.shape[0], options.dropout_p, alibi_slopes, rng_state)
    return _run_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), tensors, options)


def varlen_bwd(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    alibi_slopes,
    max_seqlen_q,
    max_seqlen_k,
    p_dropout,
    softmax_scale,
    zero_tensors,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    deterministic,
    generator,
    rng_state,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of packed sequences; gradients are written in full, with or without zero_tensors."""
    _library.require()
    max_seqlen_q = check.max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check.max_seqlen("max_seqlen_k", max_seqlen_k)
    _, _, where = prepare.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = prepare.options(
        q,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=p_dropout,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        deterministic=deterministic,
    )
    tensors = _backward_tensors(q, where.batch, options.dropout_p, alibi_slopes, rng_state, *where)
    return _run_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), tensors, options)


def fwd_kvcache(
    q,
    k_cache,
    v_cache,
    k,
    v,
    seqlens_k,
    rotary_cos,
    rotary_sin,
    cache_batch_idx,
    leftpad_k,
    block_table,
    alibi_slopes,
    out,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    is_rotary_interleaved,
    num_splits,
) -> list[Tensor]:
    """[out, softmax_lse]: `flash_attn_with_kvcache` with the compiled module's arguments."""
    result, softmax_lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        seqlens_k,
        cache_batch_idx,
        leftpad_k,
        block_table,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        is_rotary_interleaved,
        alibi_slopes,
        num_splits,
        return_softmax_lse=True,
    )
    return [result if out is None else out.copy_(result), softmax_lse]


# Named as in flash-attn, where it is the compiled module.
flash_attn_gpu = SimpleNamespace(
    fwd=fwd, varlen_fwd=varlen_fwd, bwd=bwd, varlen_bwd=varlen_bwd, fwd_kvcache=fwd_kvcache
)
