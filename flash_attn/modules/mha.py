"""Multi-head attention with grouped heads, rotary embedding, ALiBi, windows and a key-value cache.

Parameters are named as in flash-attn (`Wqkv` or `Wq` and `Wkv`, `out_proj`), so its checkpoints load.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn import _checks as check
from flash_attn._kvcache import flash_attn_with_kvcache
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.layers.rotary import RotaryEmbedding


def get_alibi_slopes(nheads: int) -> list[float]:
    """ALiBi's slopes (arXiv 2108.12409, section 3): 2^(-8i/n); for n no power of two, as its authors interpolate."""
    power = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return slopes + between[: nheads - power]


class _Attention(nn.Module):
    """Settings that self- and cross-attention share."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.dropout_p = check.dropout(attention_dropout)
        self.window_size = window_size
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def _settings(self, causal: bool | None) -> dict[str, Any]:
        slopes = self.alibi_slopes
        return {
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if slopes is None else slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """Attention on packed qkv; dropout in training mode only."""

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """qkv [batch, seq, 3, heads, dim], or [total, 3, heads, dim] with cu_seqlens and max_seqlen: out without 3."""
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._settings(causal))
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self._settings(causal))


class FlashCrossAttention(_Attention):
    """Attention on q and packed kv; dropout in training mode only."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """q [batch, seq_q, heads, dim], kv [batch, seq_k, 2, heads_kv, dim], or packed with cumulative lengths."""
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._settings(causal))
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **self._settings(causal))


class MHA(nn.Module):
    """Multi-head self- or cross-attention on hidden states.

    Args:
        embed_dim: size of the hidden states, a multiple of num_heads.
        num_heads, num_heads_kv: query heads and key-value heads (default: as many); the latter divide the former.
        cross_attn: keys and values come from x_kv.
        qkv_proj_bias, out_proj_bias: projections have a bias.
        dropout, softmax_scale, causal, window_size: as in `flash_attn_func`; dropout in training mode.
        layer_idx: key of this layer's cache in inference_params.
        rotary_emb_dim: elements of each head to rotate, 0 for none; rotary_emb_base, rotary_emb_scale_base and
            rotary_emb_interleaved: see `flash_attn.layers.rotary.RotaryEmbedding`. Self-attention only.
        use_alibi: add ALiBi's bias with `get_alibi_slopes`.
        return_residual: return (out, x).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        *,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        return_residual: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            check.fail("embed_dim", f"must be a multiple of num_heads, {num_heads}", embed_dim, "change either")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        check.heads("num_heads_kv", self.num_heads_kv, num_heads)
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.return_residual = return_residual
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if rotary_emb_dim > 0:
            if cross_attn:
                check.fail("rotary_emb_dim", "must be 0 with cross_attn", rotary_emb_dim, "rotate beforehand")
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        kv_size = 2 * self.num_heads_kv * self.head_dim
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_size, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_size, bias=qkv_proj_bias, **factory)
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        inner: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
            "window_size": window_size,
            "alibi_slopes": slopes,
        }
        self.inner_attn = FlashSelfAttention(**inner)
        self.inner_cross_attn = FlashCrossAttention(**inner)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty cache [batch_size, max_seqlen, 2, num_heads_kv, head_dim], for key_value_memory_dict[layer_idx]."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        inference_params: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends.

        Args:
            x: [batch, seq, embed_dim], or packed [total, embed_dim] with cu_seqlens and max_seqlen.
            x_kv: [batch, seq_kv, embed_dim] for cross-attention only; default x.
            key_padding_mask: must be None; pack the rows instead (`flash_attn.bert_padding`).
            inference_params: an object with key_value_memory_dict, seqlen_offset, max_seqlen, max_batch_size and
                optionally lengths_per_sample (int32 [batch]): appends to the cache and attends to all of it.
        """
        if key_padding_mask is not None:
            check.fail("key_padding_mask", "must be None", "a mask", "pack rows with flash_attn.bert_padding")
        if x_kv is not None and not self.cross_attn:
            check.fail("x_kv", "must be None without cross_attn", "a tensor", "pass cross_attn=True to the constructor")
        if cu_seqlens is not None and (self.cross_attn or self.rotary_emb_dim > 0 or inference_params is not None):
            wanted = "must be None with cross-attention, rotary embedding or a cache"
            check.fail("cu_seqlens", wanted, "a tensor", "use padded rows")
        if self.cross_attn:
            q = self.Wq(x).unflatten(-1, (self.num_heads, self.head_dim))
            kv = self.Wkv(x if x_kv is None else x_kv).unflatten(-1, (2, self.num_heads_kv, self.head_dim))
            context = self._attend(q, kv, inference_params)
        else:
            context = self._self_attend(self.Wqkv(x), cu_seqlens, max_seqlen, inference_params)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _self_attend(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: Any) -> Tensor:
        if self.num_heads_kv == self.num_heads and self.rotary_emb_dim == 0 and cache is None:
            qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
            return self.inner_attn(qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        q, kv = qkv.split([self.embed_dim, qkv.shape[-1] - self.embed_dim], dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        kv = kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        if cu_seqlens is not None:
            return self.inner_cross_attn(
                q, kv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cu_seqlens_k=cu_seqlens, max_seqlen_k=max_seqlen
            )
        if self.rotary_emb_dim > 0:
            offset, longest = (0, None) if cache is None else (_offset(cache), cache.max_seqlen)
            # Clones: autograd keeps the projection's output, and rotation is in place.
            q, kv = self.rotary_emb(q.clone(), kv.clone(), seqlen_offset=offset, max_seqlen=longest)
        return self._attend(q, kv, cache)

    def _attend(self, q: Tensor, kv: Tensor, cache: Any) -> Tensor:
        if cache is None:
            return self.inner_cross_attn(q, kv)
        if self.layer_idx is None:
            check.fail("layer_idx", "must be given to the constructor to use a cache", None, "number the layers")
        memory = cache.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(cache.max_batch_size, cache.max_seqlen, kv.dtype)
        keys = memory[self.layer_idx][: q.shape[0]]
        settings = self.inner_cross_attn._settings(None)
        return flash_attn_with_kvcache(
            q,
            keys[:, :, 0],
            keys[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=_offset(cache),
            softmax_scale=settings["softmax_scale"],
            causal=settings["causal"],
            window_size=settings["window_size"],
            alibi_slopes=settings["alibi_slopes"],
        )


def _offset(cache: Any) -> int | Tensor:
    """Keys in the cache so far."""
    lengths = getattr(cache, "lengths_per_sample", None)
    return cache.seqlen_offset if lengths is None else lengths
