"""Rotary position embedding (arXiv 2104.09864) in torch operations: any device, any float dtype, differentiable."""

import torch
from torch import Tensor

from flash_attn import _checks as check


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first rotary_dim elements of every head; the others pass.

    Args:
        x: [..., seq, heads, head_dim].
        cos, sin: [..., seq, rotary_dim / 2], one row for each row of x.
        interleaved: pairs are neighbours (GPT-J) rather than the two halves (GPT-NeoX).

    Products and sums are in float32 (float64 for float64), rounded once to x's dtype.
    """
    accum = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    cos, sin = cos.to(accum).unsqueeze(-2), sin.to(accum).unsqueeze(-2)
    turned = x[..., : 2 * half].to(accum)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates x by its positions.

    Args:
        x: [batch, seqlen, heads, head_dim], or packed [total, heads, head_dim] with cu_seqlens.
        cos, sin: [seqlen_rotary, rotary_dim / 2], rotary_dim at most head_dim.
        seqlen_offsets: an int or int32 [batch]: the position of each sequence's first row.
        cu_seqlens: int32 [batch + 1]; max_seqlen is then accepted for callers' sake and not needed.
        interleaved: see `rotate`.
        inplace: write into x and return it.
        conjugate: rotate the other way round.

    Raises:
        ValueError: the tables are too short (where that can be seen without a synchronisation) or do not fit x.
    """
    check.tensor("x", x, ("batch", "seqlen", "heads", "head_dim") if cu_seqlens is None else ("total", "heads", "dim"))
    check.rotary_tables(cos, sin, x)
    _check_offsets(seqlen_offsets, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    if cu_seqlens is None and isinstance(seqlen_offsets, int):
        end = seqlen_offsets + x.shape[1]
        if seqlen_offsets < 0 or end > cos.shape[0]:
            check.fail("cos", f"must have rows for positions {seqlen_offsets} to {end}", cos.shape[0], "extend it")
        cos, sin = cos[seqlen_offsets:end], sin[seqlen_offsets:end]
    else:
        position = _positions(x, seqlen_offsets, cu_seqlens)
        check.in_range("seqlen_offsets", position, 0, cos.shape[0] - 1, "extend cos and sin")
        cos, sin = cos[position], sin[position]
    rotated = rotate(x, cos, -sin if conjugate else sin, interleaved)
    return x.copy_(rotated) if inplace else rotated


def _check_offsets(offsets: int | Tensor, batch: int) -> None:
    """An int, or a tensor of ints [batch]."""
    if not isinstance(offsets, Tensor):
        check.integer("seqlen_offsets", offsets, "an int or a tensor of ints", "pass the first rows' positions")
    elif offsets.is_floating_point() or tuple(offsets.shape) != (batch,):
        got = f"{offsets.dtype} {list(offsets.shape)}"
        check.fail("seqlen_offsets", f"must hold ints of shape [{batch}]", got, "one position for each sequence")


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each row's position: int64 [batch, seqlen], or [total] for packed rows."""
    if not isinstance(seqlen_offsets, int):
        seqlen_offsets = seqlen_offsets.long()
    if cu_seqlens is None:
        return torch.as_tensor(seqlen_offsets)[:, None] + torch.arange(x.shape[1], device=x.device)
    row = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row.to(cu_seqlens.dtype), right=True)
    sequence = sequence.clamp(max=max(cu_seqlens.shape[0] - 2, 0))  # rows behind the last sequence
    offset = seqlen_offsets if isinstance(seqlen_offsets, int) else seqlen_offsets[sequence]
    return row - cu_seqlens.long()[sequence] + offset
