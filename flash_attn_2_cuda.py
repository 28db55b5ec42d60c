"""Where clients import flash-attn's compiled module from; the functions live in flash_attn._compiled_module."""

from flash_attn._compiled_module import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
