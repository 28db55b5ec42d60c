"""FlashAttention-2 in plain torch, line by line.

"Algorithm 1" and "Algorithm 2" and their line numbers are those of Dao, "FlashAttention-2: Faster Attention with
Better Parallelism and Work Partitioning", arXiv 2307.08691. Tensors are [..., seq, dim]: leading dimensions (batch,
heads) ride along. The paper's plain softmax is extended by the scale, the mask and chunks of keys.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_attn.reference.dense import visible_keys


def _blocks(length: int, size: int, begin: int = 0) -> Iterator[slice]:
    return (slice(at, min(at + size, length)) for at in range(begin, length, size))


def _fold(state: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Two partial results (row max, row sum, unnormalised out) over disjoint keys become one.

    A partial result over no visible key (m = -inf) is an exact no-op: exp(-inf) = 0 and exp(0) = 1.
    """
    m_a, l_a, o_a = state
    m_b, l_b, o_b = other
    m = torch.maximum(m_a, m_b)
    shift = m.masked_fill(m == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(m_a - shift), torch.exp(m_b - shift)
    return m, weight_a * l_a + weight_b * l_b, weight_a * o_a + weight_b * o_b


def flash_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_q: int = 64,
    block_k: int = 64,
    split_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: (out [..., seq_q, dim], lse [..., seq_q]) from q [..., seq_q, dim], k and v [..., seq_k, dim].

    With split_size > 0 (a multiple of block_k) keys are cut into chunks at absolute multiples of it. Each chunk starts
    from scratch, and chunks are folded in ascending order. Which blocks make up a chunk then depends on key positions
    alone, so chunks may be computed anywhere, in any order, and the bits of a row do not change: this is the
    schedule-invariant forward.
    """
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    if split_size % block_k:
        raise ValueError(f"split_size: must be a multiple of block_k, {block_k}, got {split_size} (round it up)")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = visible_keys(seqlen_q, seqlen_k, -1, 0 if causal else -1, device=q.device)
    chunk_size = split_size or max(seqlen_k, 1)
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:-1], torch.inf)
    for rows in _blocks(seqlen_q, block_q):  # line 3
        q_i = q[..., rows, :]  # line 4
        folded = _empty_state(q_i)
        for chunk in _blocks(seqlen_k, chunk_size):
            state = _empty_state(q_i)  # line 5
            for cols in _blocks(chunk.stop, block_k, chunk.start):  # line 6
                k_j, v_j = k[..., cols, :], v[..., cols, :]  # line 7
                s = scale * (q_i @ k_j.transpose(-1, -2))  # line 8
                s = s.masked_fill(~visible[rows, cols], -torch.inf)
                m, ell, o = state
                m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))  # line 9, first part
                shift = m_new.masked_fill(m_new == -torch.inf, 0.0)  # a row that has seen no key yet
                p = torch.exp(s - shift)  # line 9, second part
                rescale = torch.exp(m - shift)
                ell = rescale * ell + p.sum(dim=-1, keepdim=True)  # line 9, third part
                o = rescale * o + p @ v_j  # line 10
                state = m_new, ell, o
            folded = _fold(folded, state)
        m, ell, o = folded
        sees_none = m == -torch.inf
        out[..., rows, :] = o / ell.masked_fill(sees_none, 1.0)  # lines 12, 14
        lse[..., rows] = (m + ell.log()).masked_fill(sees_none, torch.inf).squeeze(-1)  # lines 13, 15
    return out, lse  # line 17


def _empty_state(q_i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line 5: row max -inf, row sum 0, output 0."""
    column = (*q_i.shape[:-1], 1)
    return q_i.new_full(column, -torch.inf), q_i.new_zeros(column), torch.zeros_like(q_i)


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2: (dq, dk, dv) from the gradient of out and what `flash_attention_forward` returned.

    The scale, absent in the paper, enters line 10 and, by the chain rule, lines 15 and 16.
    """
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = visible_keys(seqlen_q, seqlen_k, -1, 0 if causal else -1, device=q.device)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)  # line 3
    delta = (dout * out).sum(dim=-1, keepdim=True)  # line 4: D
    for cols in _blocks(seqlen_k, block_k):  # line 5
        k_j, v_j = k[..., cols, :], v[..., cols, :]  # line 6
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)  # line 7
        for rows in _blocks(seqlen_q, block_q):  # line 8
            q_i, dout_i = q[..., rows, :], dout[..., rows, :]  # line 9
            s = scale * (q_i @ k_j.transpose(-1, -2))  # line 10
            s = s.masked_fill(~visible[rows, cols], -torch.inf)
            p = torch.exp(s - lse[..., rows].unsqueeze(-1))  # line 11; lse = +inf gives 0
            dv_j = dv_j + p.transpose(-1, -2) @ dout_i  # line 12
            dp = dout_i @ v_j.transpose(-1, -2)  # line 13
            ds = p * (dp - delta[..., rows, :])  # line 14
            dq[..., rows, :] += scale * (ds @ k_j)  # line 15
            dk_j = dk_j + scale * (ds.transpose(-1, -2) @ q_i)  # line 16
        dk[..., cols, :], dv[..., cols, :] = dk_j, dv_j  # line 18
    return dq, dk, dv  # line 20
