"""Attention by its definition, in plain torch."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionResult(NamedTuple):
    """What attention computes.

    out has q's shape and dtype. lse, the logarithm of each row's sum of exponentials (natural, the sink included), is
    [batch, heads_q, seqlen_q], or [heads_q, total_q] for packed inputs, in float32 (float64 for float64).
    probabilities is [batch, heads_q, seqlen_q, seqlen_k], for packed inputs with the longest lengths, before dropout.
    """

    out: Tensor
    lse: Tensor
    probabilities: Tensor


def visible_keys(
    seqlen_q: int, seqlen_k: int, window_left: int = -1, window_right: int = -1, device: torch.device | None = None
) -> Tensor:
    """The mask: bool [seqlen_q, seqlen_k], true where query i sees key j.

    Both sequences end together: query i stands at key position p = i + seqlen_k - seqlen_q and sees the keys from
    p - window_left to p + window_right, both inclusive. A bound of -1 is no bound; causal is window_right = 0.
    """
    position = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)[None, :]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if window_left >= 0:
        visible = visible & (key >= position - window_left)
    if window_right >= 0:
        visible = visible & (key <= position + window_right)
    return visible


def _softmax(scores: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and LSE of scores [..., heads, seq_q, seq_k]; a row that sees nothing has probabilities 0.

    Masked scores are replaced before exp, not after, so no gradient is 0 * inf.
    """
    masked = scores.masked_fill(~visible, -torch.inf)
    logits = masked if sink is None else torch.cat([masked, sink.expand(*masked.shape[:-1], 1)], dim=-1)
    if logits.shape[-1] == 0:
        return masked, masked.new_full(masked.shape[:-1], torch.inf)
    row_max = logits.detach().amax(dim=-1, keepdim=True)
    empty = row_max == -torch.inf
    shift = row_max.masked_fill(empty, 0.0)
    exponentials = torch.exp(logits - shift)
    total = exponentials.sum(dim=-1, keepdim=True)
    total = total.masked_fill(empty, 1.0)
    probabilities = exponentials[..., : scores.shape[-1]] / total
    lse = (shift + total.log()).masked_fill(empty, torch.inf)
    return probabilities, lse.squeeze(-1)


def _attend(
    q: Tensor,  # [..., seq_q, heads_q, dim]
    k: Tensor,  # [..., seq_k, heads_kv, dim]
    v: Tensor,
    softmax_scale: float,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,  # [..., heads_q]
    sink: Tensor | None,  # [heads_q]
    dropout_p: float,
    keep: Tensor | None,  # bool [..., heads_q, seq_q, seq_k]
    mask: Tensor | None = None,  # bool, broadcastable to the same
) -> AttentionResult:
    """The definition, for one sequence or for a batch of equal ones."""
    seqlen_q, heads_q = q.shape[-3], q.shape[-2]
    seqlen_k, heads_kv = k.shape[-3], k.shape[-2]
    accum = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.transpose(-2, -3)
    # Query head h uses KV head h // (heads_q / heads_kv).
    key = k.repeat_interleave(heads_q // heads_kv, dim=-2).transpose(-2, -3)
    value = v.repeat_interleave(heads_q // heads_kv, dim=-2).transpose(-2, -3)

    scores = softmax_scale * (query @ key.transpose(-1, -2)).to(accum)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        row = torch.arange(seqlen_q, device=q.device)[:, None]
        distance = (row + (seqlen_k - seqlen_q) - torch.arange(seqlen_k, device=q.device)).abs()
        scores = scores - alibi_slopes[..., None, None].to(accum) * distance.to(accum)
    visible = visible_keys(seqlen_q, seqlen_k, *window, device=q.device)
    visible = visible if mask is None else visible & mask
    probabilities, lse = _softmax(scores, visible, None if sink is None else sink.to(accum)[:, None, None])

    weights = probabilities
    if keep is not None:
        weights = torch.where(keep, probabilities / (1.0 - dropout_p), 0.0)
    out = weights.to(q.dtype) @ value
    return AttentionResult(out.transpose(-2, -3), lse, probabilities)


def _per_sequence(
    rows: list[tuple[Tensor, Tensor, Tensor]], alibi_slopes: Tensor | None, keep: Tensor | None, settings: tuple
) -> list[AttentionResult]:
    """Applies the definition to sequences one by one: q, k, v are [seq, heads, dim] each."""
    results = []
    for index, (q, k, v) in enumerate(rows):
        slopes = alibi_slopes[index] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        kept = None if keep is None else keep[index, :, : q.shape[0], : k.shape[0]]
        scale, window, softcap, sink, dropout_p = settings
        results.append(_attend(q, k, v, scale, window, softcap, slopes, sink, dropout_p, kept))
    return results


def _pad_probabilities(results: list[AttentionResult], heads_q: int, longest_q: int, longest_k: int) -> Tensor:
    padded = [
        torch.nn.functional.pad(p, (0, longest_k - p.shape[-1], 0, longest_q - p.shape[-2]))
        for p in (result.probabilities for result in results)
    ]
    return torch.stack(padded) if padded else torch.zeros(0, heads_q, longest_q, longest_k)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: list[int], bounds_k: list[int], lengths_k: list[int], *rest
) -> AttentionResult:
    """Packed inputs: the sequences in turn; rows behind the last one see no key."""
    spans = zip(bounds_q, bounds_q[1:], bounds_k, lengths_k, strict=False)
    rows = [(q[a:b], k[c : c + n], v[c : c + n]) for a, b, c, n in spans]
    results = _per_sequence(rows, *rest)
    surplus = q.shape[0] - bounds_q[-1]
    heads_q = q.shape[-2]
    accum = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.cat([*(r.out for r in results), q.new_zeros(surplus, *q.shape[1:])])
    sink = rest[-1][3]
    no_keys = torch.full((heads_q, surplus), torch.inf, dtype=accum, device=q.device)
    if sink is not None:
        no_keys = sink.detach().to(accum)[:, None].expand(heads_q, surplus)
    lse = torch.cat([*(r.lse for r in results), no_keys], dim=-1)
    longest_q = max((b - a for a, b in pairwise(bounds_q)), default=0)
    longest_k = max((b - a for a, b in pairwise(bounds_k)), default=0)
    return AttentionResult(out, lse, _pad_probabilities(results, heads_q, longest_q, longest_k))


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    mask: Tensor | None = None,
) -> AttentionResult:
    """softmax(softmax_scale * q k^T + bias) v, the whole matrix at once; differentiable by autograd.

    Matrix products run in the inputs' dtype, the softmax in float32 (float64 for float64), so calling it with
    `.double()` inputs gives the exact answer and with 16-bit ones what plain torch would give.

    Args:
        q: [batch, seqlen_q, heads_q, dim], or packed [total_q, heads_q, dim] with cu_seqlens_q and cu_seqlens_k.
        k, v: [batch, seqlen_k, heads_kv, dim] or [total_k, heads_kv, dim]; heads_kv divides heads_q, and query head h
            uses KV head h // (heads_q / heads_kv).
        causal: query i sees no key behind i + seqlen_k - seqlen_q.
        window_size: (left, right), keys seen either side of that position; -1: no bound. See `visible_keys`.
        softmax_scale: default dim ** -0.5.
        softcap: above 0, scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
        alibi_slopes: [heads_q] or [batch, heads_q]; adds -slope * |i + seqlen_k - seqlen_q - j| (arXiv 2108.12409).
        s_aux: [heads_q], attention sinks: one more logit in every row's denominator, without a value, not scaled.
        dropout_p, dropout_mask: probabilities are kept where the mask, bool [batch, heads_q, seqlen_q, seqlen_k], is
            true, and divided by 1 - dropout_p. LSE and probabilities returned are those before dropout.
        cu_seqlens_q, cu_seqlens_k: [batch + 1], where sequences begin and end in packed rows.
        seqused_k: [batch], the keys in use of each sequence; those behind are not there.
        mask: bool, broadcastable to [batch, heads_q, seqlen_q, seqlen_k]: hides more keys where it is false. For padded
            inputs without seqused_k; the kernels have no such mask.

    Returns:
        AttentionResult. A row that sees no key has out 0 and lse +inf, or with a sink out 0 and lse = sink.

    A non-finite value in v reaches every row of its sequence and head, as 0 * inf is NaN.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = (window_size[0], 0 if causal else window_size[1])
    settings = (scale, window, softcap, s_aux, dropout_p)
    if mask is not None and (cu_seqlens_q is not None or seqused_k is not None):
        raise ValueError("mask: must be None for packed inputs and with seqused_k, got a mask (pad the batch)")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        lengths_k = [b - a for a, b in pairwise(bounds_k)]
        if seqused_k is not None:
            lengths_k = seqused_k.tolist()
        return _packed(q, k, v, bounds_q, bounds_k, lengths_k, alibi_slopes, dropout_mask, settings)
    if seqused_k is None or q.shape[0] == 0:
        return _attend(q, k, v, scale, window, softcap, alibi_slopes, s_aux, dropout_p, dropout_mask, mask)
    rows = [(q[b], k[b, :used], v[b, :used]) for b, used in enumerate(seqused_k.tolist())]
    results = _per_sequence(rows, alibi_slopes, dropout_mask, settings)
    return AttentionResult(
        torch.stack([r.out for r in results]),
        torch.stack([r.lse for r in results]),
        _pad_probabilities(results, q.shape[-2], q.shape[1], k.shape[1]),
    )
