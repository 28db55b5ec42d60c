"""Rotary position embedding (arXiv 2104.09864), with the length extrapolation of XPos (arXiv 2212.10554)."""

import torch
from torch import Tensor, nn

from flash_attn import _checks as check
from flash_attn.ops.triton.rotary import apply_rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`flash_attn.ops.triton.rotary.apply_rotary` with the argument order of layers; differentiable in x."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k inside qkv, in place, and returns qkv.

    Args:
        qkv: [batch, seqlen, 3, heads, head_dim], or [batch, seqlen, heads_q + 2 * heads_kv, head_dim] with num_heads_q.
        cos, sin, cos_k, sin_k: [seqlen_rotary, rotary_dim / 2]; k's own tables default to q's.
    """
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif num_heads_q is None:
        check.fail("num_heads_q", "must be given with 4-dimensional qkv", None, "pass the number of q heads")
    else:
        heads_kv = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_kv]
    apply_rotary(q, cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary(k, cos_k, sin_k, seqlen_offsets, interleaved=interleaved, inplace=True)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotates k inside kv [batch, seqlen, 2, heads, head_dim], in place, and returns kv."""
    apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    return kv


class RotaryEmbedding(nn.Module):
    """Keeps tables of cosines and sines and rotates q and k with them.

    Args:
        dim: rotary_dim, even, at most head_dim.
        base: wavelengths go from 2 pi to 2 pi * base.
        interleaved: see `flash_attn.ops.triton.rotary.rotate`.
        scale_base: XPos: q is scaled up and k down with the position over scale_base. None: off.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        if dim < 2 or dim % 2:
            check.fail("dim", "must be even and at least 2", dim, "rotate pairs of elements")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _frequencies(self, device: torch.device | None) -> Tensor:
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (even / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None, dtype=None) -> None:
        """Makes tables for positions 0 to seqlen - 1; computed in float32 from float32 frequencies."""
        cached = self._cos_cached
        if cached is not None and cached.device == device and cached.dtype == dtype:
            usable = not (self.training and cached.is_inference())
            if usable and seqlen <= self._seq_len_cached:
                return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # Recomputed when the module was cast: bf16 frequencies would be wrong by whole turns at long distances.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._frequencies(device)
        angle = torch.outer(position, inv_freq.to(device))
        cos, sin = angle.cos(), angle.sin()
        if self.scale is not None and self.scale_base is not None:
            power = (position - seqlen // 2) / self.scale_base
            scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
            self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place.

        Args:
            qkv: as in `apply_rotary_emb_qkv_`; with kv given, q alone, [batch, seqlen, heads, head_dim].
            kv: [batch, seqlen, 2, heads_kv, head_dim].
            seqlen_offset: position of the first row, an int or int32 [batch] (pass max_seqlen then).
            max_seqlen: positions that tables must cover.

        Returns:
            qkv, or (q, kv).
        """
        seqlen = qkv.shape[1]
        if max_seqlen is not None:
            needed = max_seqlen
        elif isinstance(seqlen_offset, int):
            needed = seqlen + seqlen_offset
        else:
            needed = seqlen + int(seqlen_offset.max())
        self._update_cos_sin_cache(needed, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        assert cos is not None and sin is not None  # just made
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        interleaved = self.interleaved
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, interleaved, seqlen_offset)
