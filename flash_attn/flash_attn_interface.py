"""The public functions. Layout [batch, seq, heads, dim], or packed [total, heads, dim] with cumulative lengths.

What is common to all of them:

- dtypes float16, bfloat16, float32 on every device, float64 on the CPU; head_dim 1 to 256; any lengths from 0 on.
  Strided inputs are read in place where the innermost stride is 1, and copied otherwise.
- heads_kv divides heads_q; query head h uses KV head h // (heads_q / heads_kv).
- dropout_p: probability to drop, in [0, 1). Masks follow torch.manual_seed.
- softmax_scale: default head_dim ** -0.5.
- causal: aligned to the bottom right corner, so query i sees no key behind i + seqlen_k - seqlen_q.
- window_size (left, right): keys seen either side of that position, both inclusive; -1: no bound.
- softcap: above 0, scores become softcap * tanh(score / softcap).
- alibi_slopes: float32 [heads_q] or [batch, heads_q]; adds -slope * |i + seqlen_k - seqlen_q - j| to the score.
- s_aux: attention sinks, [heads_q]: one more logit in each row's denominator, not scaled; differentiable.
- deterministic: the backward repeats its bits. OR-ed with `flash_attn.set_deterministic_mode` and the environment.
- return_attn_probs: returns (out, softmax_lse, S_dmask). softmax_lse is float32 (float64 for float64),
  [batch, heads_q, seqlen_q] or packed [heads_q, total_q], and differentiable. S_dmask, with dropout only (else it is
  empty), is [batch, heads_q, seqlen_q, seqlen_k]: probabilities before dropout, negative where dropped.
- A row that sees no key gives 0, and LSE +inf; with a sink 0, and LSE = sink.

`flash_attn.reference.attention_reference` is the definition. The method is FlashAttention-2's, arXiv 2307.08691;
names and signatures are those of the flash-attn package, 2.8.3. Errors: ValueError, TypeError for arguments that do
not fit, RuntimeError where the compiled library is missing.
"""

from typing import Any, TypeAlias

from flash_attn import _checks as check
from flash_attn import _library
from flash_attn import _prepare as prepare
from flash_attn._compiled_module import flash_attn_gpu
from flash_attn._kvcache import flash_attn_with_kvcache
from flash_attn._low_level import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from flash_attn._ops import forward, innermost_contiguous, packed_forward

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_unpadded_qkvpacked_split_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# out, or (out, softmax_lse, S_dmask) with return_attn_probs: a union would make every caller narrow it.
Result: TypeAlias = Any


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
) -> Result:
    """Attention of padded sequences: out [batch, seqlen_q, heads_q, dim].

    q is [batch, seqlen_q, heads_q, dim], k and v are [batch, seqlen_k, heads_kv, dim]. See the module for the rest.
    """
    _library.require()
    check.qkv(q, k, v)
    options = prepare.options(
        q,
        q.shape[1],
        k.shape[1],
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    tensors = prepare.tensors(q, q.shape[0], options.dropout_p, alibi_slopes=alibi_slopes, s_aux=s_aux)
    result = forward(q, k, v, tensors, options)
    return result if return_attn_probs else result[0]


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """flash_attn_func with kv [batch, seqlen_k, 2, heads_kv, dim]; its gradient is written without a copy."""
    _library.require()
    check.packed_qkv(kv, "kv", 2, packed=False)
    check.qkv(q, kv[:, :, 0], kv[:, :, 1], ("q", "kv", "kv"))
    options = prepare.options(
        q,
        q.shape[1],
        kv.shape[1],
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    tensors = prepare.tensors(q, q.shape[0], options.dropout_p, alibi_slopes=alibi_slopes)
    result = packed_forward(innermost_contiguous(q), innermost_contiguous(kv), tensors, options)
    return result if return_attn_probs else result[0]


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """flash_attn_func with qkv [batch, seqlen, 3, heads, dim]; its gradient is written without a copy."""
    _library.require()
    check.packed_qkv(qkv, "qkv", 3, packed=False)
    q = qkv[:, :, 0]
    check.qkv(q, qkv[:, :, 1], qkv[:, :, 2], ("qkv", "qkv", "qkv"))
    options = prepare.options(
        q,
        q.shape[1],
        q.shape[1],
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    tensors = prepare.tensors(q, q.shape[0], options.dropout_p, alibi_slopes=alibi_slopes)
    result = packed_forward(None, innermost_contiguous(qkv), tensors, options)
    return result if return_attn_probs else result[0]


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    s_aux=None,
) -> Result:
    """Attention of packed sequences: out [total_q, heads_q, dim].

    Args:
        q: [total_q, heads_q, dim]; sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k, v: [total_k, heads_kv, dim], or with block_table pages [num_blocks, page_size, heads_kv, dim].
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1] on q's device, starting with 0.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length; an int or a 0-d tensor (which is read).
        block_table: int32 [batch, pages], the pages of each sequence in order. Read where they lie as
            `flash_attn_with_kvcache` does, unless a gradient is wanted.
    """
    _library.require()
    max_seqlen_q = check.max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check.max_seqlen("max_seqlen_k", max_seqlen_k)
    where = prepare.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table)
    options = prepare.options(
        q,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    tensors = prepare.tensors(q, where.batch, options.dropout_p, *where, alibi_slopes=alibi_slopes, s_aux=s_aux)
    result = forward(q, k, v, tensors, options, block_table)
    return result if return_attn_probs else result[0]


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """flash_attn_varlen_func with kv [total_k, 2, heads_kv, dim]; its gradient is written without a copy."""
    _library.require()
    check.packed_qkv(kv, "kv", 2, packed=True)
    max_seqlen_q = check.max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check.max_seqlen("max_seqlen_k", max_seqlen_k)
    names = ("q", "kv", "kv")
    where = prepare.sequences(
        q, kv[:, 0], kv[:, 1], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, names=names
    )
    options = prepare.options(
        q,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    tensors = prepare.tensors(q, where.batch, options.dropout_p, *where, alibi_slopes=alibi_slopes)
    result = packed_forward(innermost_contiguous(q), innermost_contiguous(kv), tensors, options)
    return result if return_attn_probs else result[0]


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
) -> Result:
    """flash_attn_varlen_func with qkv [total, 3, heads, dim]; its gradient is written without a copy."""
    _library.require()
    check.packed_qkv(qkv, "qkv", 3, packed=True)
    max_seqlen = check.max_seqlen("max_seqlen", max_seqlen)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    names = ("qkv", "qkv", "qkv")
    where = prepare.sequences(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, names=names)
    options = prepare.options(
        q,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    tensors = prepare.tensors(q, where.batch, options.dropout_p, *where, alibi_slopes=alibi_slopes)
    result = packed_forward(None, innermost_contiguous(qkv), tensors, options)
    return result if return_attn_probs else result[0]


# The names of version 0.2. Their softmax_lse is that of the functions they stand for, [heads, total].


def flash_attn_unpadded_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
) -> Result:
    """flash_attn_varlen_func under its name of version 0.2."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(
        q, k, v, *lengths, dropout_p, softmax_scale, causal, return_attn_probs=return_attn_probs
    )


def flash_attn_unpadded_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
) -> Result:
    """flash_attn_varlen_kvpacked_func under its name of version 0.2."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_kvpacked_func(
        q, kv, *lengths, dropout_p, softmax_scale, causal, return_attn_probs=return_attn_probs
    )


def flash_attn_unpadded_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale=None, causal=False, return_attn_probs=False
) -> Result:
    """flash_attn_varlen_qkvpacked_func under its name of version 0.2."""
    return flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, return_attn_probs=return_attn_probs
    )


def flash_attn_unpadded_qkvpacked_split_func(
    qkv,
    cu_seqlens,
    max_seqlen0,
    max_seqlen1,
    batch_size0,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
) -> Result:
    """Version 0.2: the first batch_size0 sequences are at most max_seqlen0 long, the others at most max_seqlen1.

    Version 0.2 launched a kernel for either part; one launch serves any mixture of lengths here.

    Returns:
        out, or with return_attn_probs (out, softmax_lse, S_dmask of the first part, S_dmask of the second).
    """
    check.packed_qkv(qkv, "qkv", 3, packed=True)
    longest0 = check.max_seqlen("max_seqlen0", max_seqlen0)
    longest1 = check.max_seqlen("max_seqlen1", max_seqlen1)
    batch = check.int32_vector("cu_seqlens", cu_seqlens, qkv.device).shape[0] - 1
    batch_size0 = check.integer("batch_size0", batch_size0, "an int", "count the first part")
    if not 0 <= batch_size0 <= batch:
        check.fail("batch_size0", f"must lie between 0 and the batch, {batch}", batch_size0, "count the first part")
    ends0, ends1 = cu_seqlens[: batch_size0 + 1], cu_seqlens[batch_size0:]
    check.cu_seqlens("cu_seqlens of the first part", ends0, qkv.device, None, longest0)
    check.cu_seqlens("cu_seqlens of the second part", ends1 - ends1[:1], qkv.device, None, longest1)
    result = flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max(longest0, longest1),
        dropout_p,
        softmax_scale,
        causal,
        return_attn_probs=return_attn_probs,
    )
    if not return_attn_probs:
        return result
    out, softmax_lse, s_dmask = result
    if dropout_p == 0.0:
        return out, softmax_lse, s_dmask, s_dmask
    first, second = s_dmask[:batch_size0], s_dmask[batch_size0:]
    return out, softmax_lse, first[:, :, :longest0, :longest0], second[:, :, :longest1, :longest1]
