"""The modules of version 0.2: `FlashAttention` on packed qkv, `FlashMHA` on hidden states.

Not to be confused with `flash_attn.modules`: see there for which module takes what.
"""

import torch
from torch import Tensor, nn

from flash_attn import _checks as check
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func


class FlashAttention(nn.Module):
    """Softmax attention on packed qkv.

    Args:
        softmax_scale: default head_dim ** -0.5.
        attention_dropout: probability to drop, in training mode.
        device, dtype: accepted as in version 0.2; the module has no parameters.
    """

    def __init__(
        self,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = check.dropout(attention_dropout)

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """(out, None); weights are never formed.

        Args:
            qkv: [batch, seqlen, 3, heads, head_dim], or packed [total, 3, heads, head_dim] with cu_seqlens and max_s.
            key_padding_mask: bool [batch, seqlen], true where a token is. Padding rows give 0.

        Returns:
            out [batch, seqlen, heads, head_dim] or [total, heads, head_dim], and None.
        """
        if need_weights:
            check.fail("need_weights", "must be False", True, "use flash_attn.reference for the probabilities")
        settings = (self.dropout_p if self.training else 0.0, self.softmax_scale, causal)
        if cu_seqlens is not None:
            if max_s is None:
                check.fail("max_s", "must be given with cu_seqlens", None, "pass the longest sequence's length")
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, *settings), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, *settings), None
        batch, seqlen = qkv.shape[:2]
        rows, indices, cu_seqlens, longest, _ = unpad_input(qkv, key_padding_mask)
        out = flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, longest, *settings)
        return pad_input(out, indices, batch, seqlen), None


class FlashMHA(nn.Module):
    """Multi-head self-attention: projection to qkv, `FlashAttention`, projection back.

    Args:
        embed_dim: size of the hidden states, a multiple of num_heads.
        num_heads: heads of embed_dim / num_heads elements.
        bias: projections have a bias.
        batch_first: must be True.
        attention_dropout, causal: as in `FlashAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not batch_first:
            check.fail("batch_first", "must be True", batch_first, "transpose the hidden states")
        if num_heads < 1 or embed_dim % num_heads:
            check.fail("embed_dim", f"must be a multiple of num_heads, {num_heads}", embed_dim, "change either")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """x [batch, seqlen, embed_dim], key_padding_mask bool [batch, seqlen]: (out like x, None)."""
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        out, weights = self.inner_attn(
            qkv, key_padding_mask=key_padding_mask, need_weights=need_weights, causal=self.causal
        )
        return self.out_proj(out.flatten(-2)), weights
