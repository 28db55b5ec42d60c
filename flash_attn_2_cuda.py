"""The name under which clients import flash-attn's compiled module; the functions live in flash_attn._low_level."""

from flash_attn._low_level import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
