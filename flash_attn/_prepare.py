"""From checked arguments of the public functions to the operators' arguments."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _checks as check
from flash_attn import modes
from flash_attn._ops import Options, Tensors, accum_dtype, cumulative


def options(
    q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Options:
    """The operators' scalars, with the modes in force folded in.

    S_dmask costs memory quadratic in the length and shows what dropout did, so it is asked for only with dropout;
    clients call with return_attn_probs=True and no dropout to get the LSE.
    """
    dropout_p = check.dropout(dropout_p)
    window_left, window_right = check.window(window_size, causal)
    return Options(
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else check.number("softmax_scale", softmax_scale),
        window_left=window_left,
        window_right=window_right,
        softcap=check.softcap(softcap),
        dropout_p=dropout_p,
        split_size=modes.split_size_for(q),
        performance_mode=modes.is_performance_mode(),
        return_s_dmask=bool(return_attn_probs) and dropout_p > 0.0,
        deterministic=modes.is_deterministic(bool(deterministic)),
    )


def tensors(
    q: Tensor,
    batch: int,
    dropout_p: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    *,
    alibi_slopes: Any = None,
    s_aux: Any = None,
    generator: torch.Generator | None = None,
) -> Tensors:
    """The operators' optional tensors."""
    check.sink(s_aux, q)
    return Tensors(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        alibi_slopes=check.alibi(alibi_slopes, q, batch),
        sink=None if s_aux is None else s_aux.to(accum_dtype(q.dtype)).contiguous(),
        rng_state=rng_state(q.device, generator) if dropout_p > 0.0 else None,
    )


def rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Seed and offset of the dropout, int64 [2] on the device.

    Drawn by torch: torch.manual_seed repeats it, a CUDA graph's replay draws afresh, torch.compile can trace it.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def check_block_table(block_table: Any, k: Tensor, batch: int, lengths: Tensor | None, longest: int) -> Tensor:
    """block_table, int32 [batch, pages], with pages enough for `longest` keys and used entries (all without lengths)
    in range."""
    check.tensor("block_table", block_table, ("batch", "pages"))
    if block_table.dtype != torch.int32:
        check.fail("block_table", "dtype must be torch.int32", block_table.dtype, "convert with .int()")
    if block_table.device != k.device:
        check.fail("block_table", f"device must be that of the pages, {k.device}", block_table.device, "move it")
    if block_table.shape[0] != batch:
        check.fail("block_table", f"batch must be {batch}", block_table.shape[0], "one row for each sequence")
    page_size = k.shape[1]
    if longest > block_table.shape[1] * page_size:
        wanted = f"must have pages for {longest} keys, {-(-longest // page_size)} pages of {page_size}"
        check.fail("block_table", wanted, f"{block_table.shape[1]} pages", "add columns")
    if check.values_are_readable(block_table):
        first_key = torch.arange(block_table.shape[1], device=block_table.device) * page_size
        used = block_table if lengths is None else block_table[first_key[None, :] < lengths[:, None]]
        check.in_range("block_table", used, 0, k.shape[0] - 1, "point at existing pages")
    return block_table


class Sequences(NamedTuple):
    """Where packed sequences lie; keys in `seqused_k` where not all of a span is in use."""

    cu_seqlens_q: Tensor  # int32 [batch + 1]
    cu_seqlens_k: Tensor  # int32 [batch + 1]
    seqused_k: Tensor | None = None  # int32 [batch]

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1


def sequences(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Any = None,
    block_table: Any = None,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> Sequences:
    """Checks packed inputs and returns where the sequences lie; with a block_table cu_seqlens_k tells lengths only."""
    if block_table is None:
        check.qkv(q, k, v, names, packed=True)
    else:
        check.paged(q, k, v, packed=True)
    total_k = k.shape[0] if block_table is None else None
    cu_seqlens_q = check.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device, q.shape[0], max_seqlen_q)
    cu_seqlens_k = check.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device, total_k, max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] != batch + 1:
        check.fail(
            "cu_seqlens_k", f"must have {batch + 1} entries like cu_seqlens_q", cu_seqlens_k.shape[0], "match it"
        )
    if seqused_k is not None:
        seqused_k = check.int32_vector("seqused_k", seqused_k, q.device, batch)
    if block_table is not None:
        lengths = seqused_k
        if lengths is None and check.values_are_readable(block_table):
            lengths = cu_seqlens_k.diff()
        check_block_table(block_table, k, batch, lengths, max_seqlen_k)
        if seqused_k is not None:  # alone says how long sequences are
            cu_seqlens_k = cumulative(batch, max_seqlen_k, q.device)
    return Sequences(cu_seqlens_q, cu_seqlens_k, seqused_k)
