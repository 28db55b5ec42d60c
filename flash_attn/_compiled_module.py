"""What flash-attn's compiled module offers, with its positional arguments and result orders (2.8.3).

Clients find it as `flash_attn.flash_attn_interface.flash_attn_gpu` and as the module `flash_attn_2_cuda`. In spite of
those names the functions run wherever their tensors are.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from flash_attn import _checks as check
from flash_attn import _library, _ops
from flash_attn import _prepare as prepare
from flash_attn._kvcache import flash_attn_with_kvcache
from flash_attn._ops import innermost_contiguous


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor | None,
    tensors: _ops.Tensors,
    options: _ops.Options,
    block_table: Tensor | None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state], with out copied into `place` where the caller has one."""
    if place is not None:
        _check_like("out", place, "q", q)
    out, softmax_lse, s_dmask = _ops.forward(q, k, v, tensors, options, block_table)
    rng_state = tensors.rng_state
    if rng_state is None:  # clients save it whether or not there is dropout
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return [out if place is None else place.copy_(out), softmax_lse, s_dmask, rng_state]


def _check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """x has the shape, dtype and device of `like`."""
    if not isinstance(x, Tensor):
        check.fail_type(name, "a torch.Tensor", x, f"pass a tensor like {like_name}")
    if (x.dtype, x.shape, x.device) != (like.dtype, like.shape, like.device):
        got, wanted = (f"{y.dtype} {list(y.shape)} on {y.device}" for y in (x, like))
        check.fail(name, f"must be {wanted} like {like_name}", got, "allocate it so")


def _run_backward(
    dout, q, k, v, out, softmax_lse, gradients, tensors: _ops.Tensors, options: _ops.Options
) -> list[Tensor]:
    """Writes into `gradients`; one that is missing or whose last stride is not 1 is written elsewhere first."""
    q, k, v = innermost_contiguous(q), innermost_contiguous(k), innermost_contiguous(v)
    _check_like("dout", dout, "q", q)
    _check_like("out", out, "q", q)
    check.tensor("softmax_lse", softmax_lse, ("batch", "heads", "seqlen") if q.dim() == 4 else ("heads", "total"))
    for name, gradient, like in zip("qkv", gradients, (q, k, v), strict=True):
        if gradient is not None:
            _check_like(f"d{name}", gradient, name, like)
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
        return_attn_probs=return_softmax,
    )
    check.gpu_generator("generator", generator)
    tensors = prepare.tensors(q, q.shape[0], options.dropout_p, alibi_slopes=alibi_slopes, generator=generator)
    return _run_forward(q, k, v, out, tensors, options)


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
    _library.require()
    if leftpad_k is not None:
        check.fail("leftpad_k", "is not supported for packed keys", "a tensor", "start cu_seqlens_k behind the padding")
    max_seqlen_q = check.max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check.max_seqlen("max_seqlen_k", max_seqlen_k)
    where = prepare.sequences(
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
        dropout_p=p_dropout,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        return_attn_probs=return_softmax,
    )
    check.gpu_generator("generator", generator)
    tensors = prepare.tensors(q, where.batch, options.dropout_p, *where, alibi_slopes=alibi_slopes, generator=generator)
    return _run_forward(q, k, v, out, tensors, options, block_table)


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
    where = prepare.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
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
