"""Finds and loads the compiled library that defines the `flash_attn::*` operators.

Importing the package never fails for want of a build: `require()` raises at the first call that needs a kernel, and
says what to do. `flash_attn.reference` and `flash_attn.bert_padding` work without one.
"""

from pathlib import Path

import torch

FORWARD_ARGUMENTS = (
    "q k v cu_seqlens_q cu_seqlens_k seqused_k alibi_slopes sink rng_state max_seqlen_q max_seqlen_k softmax_scale "
    "window_left window_right softcap dropout_p split_size performance_mode return_s_dmask deterministic"
)
BACKWARD_ARGUMENTS = (
    "dout dlse q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k seqused_k alibi_slopes sink rng_state "
    "max_seqlen_q max_seqlen_k softmax_scale window_left window_right softcap dropout_p deterministic performance_mode"
)
PAGES_ARGUMENTS = (
    "q k v block_table cu_seqlens_q cu_seqlens_k seqused_k alibi_slopes sink max_seqlen_q max_seqlen_k softmax_scale "
    "window_left window_right softcap split_size performance_mode deterministic"
)
APPEND_ARGUMENTS = "q k v k_cache v_cache cache_seqlens block_table rotary_cos rotary_sin interleaved queries_advance"
_EXPECTED = {
    "forward": FORWARD_ARGUMENTS,
    "backward": BACKWARD_ARGUMENTS,
    "forward_pages": PAGES_ARGUMENTS,
    "append": APPEND_ARGUMENTS,
}

_REBUILD = "rebuild with `pip install .` in the source tree, with the Python and the torch that you run"

# Device types with kernels, filled by load(). "meta" has the fake kernels.
DEVICE_TYPES: frozenset[str] = frozenset({"meta"})

_problem: str | None = None
_cause: Exception | None = None


def _library_path() -> Path | None:
    folder = Path(__file__).parent
    return next((folder / name for name in ("_C.abi3.so", "_C.so") if (folder / name).exists()), None)


def _operators_exist() -> bool:
    return all(torch._C._jit_get_schemas_for_operator(f"flash_attn::{name}") for name in _EXPECTED)


def _schema_problem() -> str | None:
    """Compares the loaded operators with what this Python layer passes."""
    for name, expected in _EXPECTED.items():
        schema = torch._C._jit_get_schemas_for_operator(f"flash_attn::{name}")[0]
        got = " ".join(argument.name for argument in schema.arguments)
        if got != expected:
            return f"flash_attn::{name} takes ({got}), this Python layer expects ({expected})"
    return None


def load() -> bool:
    """Loads the library unless its operators are there already; returns whether they may be used."""
    global DEVICE_TYPES, _problem, _cause
    if not _operators_exist():
        path = _library_path()
        if path is None:
            _problem = f"the compiled library _C.abi3.so is missing from {Path(__file__).parent}"
            return False
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            _problem, _cause = f"{path.name} does not load under torch {torch.__version__}: {error}", error
            return False
        if not _operators_exist():
            _problem = f"{path.name} loaded but defines no flash_attn::forward and flash_attn::backward"
            return False
    _problem = _schema_problem()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    built = (kind for kind in ("cpu", "cuda") if has_kernel("flash_attn::forward", kind.upper()))
    DEVICE_TYPES = frozenset({"meta", *built})
    return _problem is None


def problem() -> str | None:
    """Why no kernel can run, or None when all is well."""
    return _problem


def require() -> None:
    """Raises RuntimeError, saying what is wrong and what to do, unless the operators can be used."""
    if _problem is not None:
        raise RuntimeError(f"flash_attn: {_problem} ({_REBUILD})") from _cause
