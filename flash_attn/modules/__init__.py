"""Attention modules. Which takes what:

| module                                    | input                                    | has projections |
|-------------------------------------------|------------------------------------------|-----------------|
| `flash_attn.modules.FlashAttentionCore`   | q, k, v [batch, heads, seq, head_dim]    | no              |
| `flash_attn.modules.FlashAttentionLayer`  | hidden states [batch, seq, hidden]       | yes             |
| `flash_attn.modules.mha.MHA`              | hidden states, with rotary, GQA, KV cache| yes             |
| `flash_attn.modules.mha.FlashSelfAttention`, `FlashCrossAttention` | packed qkv; q and kv | no         |
| `flash_attn.flash_attention.FlashAttention` | packed qkv (version 0.2)               | no              |
| `flash_attn.flash_attention.FlashMHA`     | hidden states (version 0.2)              | yes             |
"""

from flash_attn.modules.core import FlashAttentionCore
from flash_attn.modules.layer import FlashAttentionLayer
from flash_attn.modules.mha import MHA, FlashCrossAttention, FlashSelfAttention

__all__ = ["MHA", "FlashAttentionCore", "FlashAttentionLayer", "FlashCrossAttention", "FlashSelfAttention"]
