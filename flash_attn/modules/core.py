"""Attention on q, k, v with heads before the sequence."""

from torch import Tensor, nn

from flash_attn import _checks as check
from flash_attn.flash_attn_interface import flash_attn_func


class FlashAttentionCore(nn.Module):
    """softmax(q k^T * scale) v on tensors [batch, heads, seq, head_dim]; no parameters.

    Args:
        head_dim: the last dimension of q, k and v, 1 to 256.
        causal: mask aligned to the bottom right corner.
        dropout: probability to drop, in training mode.
        softmax_scale: default head_dim ** -0.5.
    """

    def __init__(self, head_dim: int, causal: bool = False, dropout: float = 0.0, softmax_scale: float | None = None):
        super().__init__()
        if not 1 <= head_dim <= check.MAX_HEAD_DIM:
            check.fail("head_dim", f"must lie between 1 and {check.MAX_HEAD_DIM}", head_dim, "pad or split the heads")
        self.head_dim = head_dim
        self.causal = causal
        self.dropout = check.dropout(dropout)
        self.softmax_scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [batch, heads, seq_q, head_dim], k and v [batch, heads_kv, seq_k, head_dim]: out like q.

        The tensors are read through transposed views, not copied.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            check.tensor(name, x, ("batch", "heads", "seq", "head_dim"))
            if x.shape[-1] != self.head_dim:
                check.fail(name, f"head_dim must be the module's, {self.head_dim}", x.shape[-1], "check the layout")
        out = flash_attn_func(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.dropout if self.training else 0.0,
            self.softmax_scale,
            self.causal,
        )
        return out.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, causal={self.causal}, dropout={self.dropout}"
