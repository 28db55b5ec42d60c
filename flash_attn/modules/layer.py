"""Self-attention on hidden states, with masks and, on request, the attention matrix."""

import torch
from torch import Tensor, nn

from flash_attn import _checks as check
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn.reference import attention_reference


class FlashAttentionLayer(nn.Module):
    """Projections to q, k, v, attention, projection back.

    Args:
        hidden_size: size of the hidden states, a multiple of num_heads.
        num_heads: heads of hidden_size / num_heads elements.
        block_size: positive. Implementations in plain torch take their tile size here; the kernels choose their own
            tiles, and results do not depend on them beyond rounding.
        causal: a token sees itself and those before it.
        dropout: probability to drop attention, in training mode.
        softmax_scale: default head_dim ** -0.5.
        bias: projections have a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        block_size: int = 256,
        causal: bool = False,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            check.fail("hidden_size", f"must be a multiple of num_heads, {num_heads}", hidden_size, "change either")
        if block_size < 1:
            check.fail("block_size", "must be positive", block_size, "leave the default")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.block_size = block_size
        self.causal = causal
        self.dropout = check.dropout(dropout)
        self.softmax_scale = softmax_scale
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within each batch row.

        Args:
            hidden_states: [batch, seq, hidden_size].
            attention_mask: bool or int, nonzero where a key may be seen: [batch, seq] for padding (stays on the fast
                path; rows of padding give the output projection of 0), or [batch, seq, seq] or
                [batch, 1 or num_heads, 1 or seq, seq] (needs the dense path: memory quadratic in seq).
            return_attention: also return the probabilities (before dropout), by the dense path.

        Returns:
            out like hidden_states, or (out, attention [batch, num_heads, seq, seq]).
        """
        check.tensor("hidden_states", hidden_states, ("batch", "seq", "hidden_size"))
        if hidden_states.shape[-1] != self.hidden_size:
            wanted = f"last dimension must be hidden_size, {self.hidden_size}"
            check.fail("hidden_states", wanted, hidden_states.shape[-1], "build the layer for it")
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            check.fail_type("attention_mask", "a torch.Tensor or None", attention_mask, "pass a bool or int tensor")
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        if not return_attention and (attention_mask is None or attention_mask.dim() == 2):
            return self.out_proj(self._fast(qkv, attention_mask).flatten(-2))
        context, attention = self._dense(qkv, attention_mask)
        out = self.out_proj(context.flatten(-2))
        return (out, attention) if return_attention else out

    def _fast(self, qkv: Tensor, padding: Tensor | None) -> Tensor:
        settings = (self.dropout if self.training else 0.0, self.softmax_scale, self.causal)
        if padding is None:
            return flash_attn_qkvpacked_func(qkv, *settings)
        batch, seq = qkv.shape[:2]
        self._check_mask(padding, (batch, seq))
        rows, indices, cu_seqlens, longest, _ = unpad_input(qkv, padding != 0)
        return pad_input(flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, longest, *settings), indices, batch, seq)

    def _dense(self, qkv: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, seq = qkv.shape[:2]
        dropout_p = self.dropout if self.training else 0.0
        keep = None
        if dropout_p > 0.0:
            keep = torch.rand(batch, self.num_heads, seq, seq, device=qkv.device) >= dropout_p
        result = attention_reference(
            *qkv.unbind(2),
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            mask=None if mask is None else self._full_mask(mask, batch, seq),
            dropout_p=dropout_p,
            dropout_mask=keep,
        )
        return result.out, result.probabilities

    def _full_mask(self, mask: Tensor, batch: int, seq: int) -> Tensor:
        """Any accepted mask as bool, broadcastable to [batch, num_heads, seq, seq]."""
        shown = mask != 0
        if mask.dim() == 2:
            self._check_mask(mask, (batch, seq))
            return shown[:, None, :, None] & shown[:, None, None, :]
        if mask.dim() == 3:
            self._check_mask(mask, (batch, seq, seq))
            return shown[:, None]
        heads = self.num_heads if mask.dim() == 4 and mask.shape[1] != 1 else 1
        rows = seq if mask.dim() == 4 and mask.shape[2] != 1 else 1
        self._check_mask(mask, (batch, heads, rows, seq))
        return shown

    @staticmethod
    def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
        if mask.is_floating_point():
            check.fail("attention_mask", "dtype must be bool or int", mask.dtype, "pass mask == 0 for additive masks")
        if tuple(mask.shape) != shape:
            fix = "1 where a key may be seen"
            check.fail("attention_mask", f"shape must be {list(shape)}", list(mask.shape), fix)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}, dropout={self.dropout}"
