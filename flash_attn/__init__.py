"""Exact attention, forward and backward, from one set of kernel templates for CPU, NVIDIA and AMD.

A drop-in for the `flash_attn` package at compatibility level 2.8.3, with named determinism guarantees
(`set_deterministic_mode`). Start with `flash_attn_func`; `python -m flash_attn info` says what is installed.
"""

# The only definition of the version. 2.8.3 is the interface this package is compatible with, postN counts releases.
__version__ = "2.8.3.post1"

from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
    flash_attn_unpadded_qkvpacked_split_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.modes import DeterministicMode, deterministic_mode, get_deterministic_mode, set_deterministic_mode

__all__ = [
    "DeterministicMode",
    "deterministic_mode",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_unpadded_qkvpacked_split_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_deterministic_mode",
    "set_deterministic_mode",
]
