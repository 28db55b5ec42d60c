"""Attention in plain torch: what the kernels must compute, for tests, teaching and debugging.

`attention_reference` is the dense definition and the only place where the mask is defined. `flash_attention_forward`
and `flash_attention_backward` follow the FlashAttention-2 paper line by line.
"""

from flash_attn.reference.dense import AttentionResult, attention_reference, visible_keys
from flash_attn.reference.tiled import flash_attention_backward, flash_attention_forward

__all__ = [
    "AttentionResult",
    "attention_reference",
    "flash_attention_backward",
    "flash_attention_forward",
    "visible_keys",
]
