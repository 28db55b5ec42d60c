"""Between padded batches [batch, seqlen, ...] and packed rows [total, ...]; differentiable, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _checks as check

try:
    from einops import rearrange  # clients import it from here
except ImportError:

    def rearrange(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
        """The patterns of `einops.rearrange` that move between batches and rows; any other needs einops."""
        if pattern == "b s ... -> (b s) ...":
            return tensor.flatten(0, 1)
        if pattern == "c b s ... -> (b s) c ...":
            return tensor.movedim(0, 2).flatten(0, 1)
        if pattern == "(b s) ... -> b s ...":
            size = (axes_lengths["b"], -1) if "b" in axes_lengths else (-1, axes_lengths["s"])
            return tensor.unflatten(0, size)
        if pattern == "b ... -> b (...)":
            return tensor.reshape(tensor.shape[0], -1)
        if pattern in ("b s h d -> b s (h d)", "... h d -> ... (h d)"):
            return tensor.flatten(-2)
        raise NotImplementedError(f"rearrange: pattern {pattern!r} needs einops (pip install einops)")


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of input: [rows, ...] and int64 [n] give [n, ...]."""
    return input.index_select(0, indices.long())


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse: [n, ...] scattered to rows `indices` (distinct) of zeros [first_axis_dim, ...]."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis` and the input itself."""
    return index_first_axis(input, indices), input


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    check.tensor(name, mask, ("batch", "seqlen"))
    if mask.shape != hidden_states.shape[:2]:
        wanted = f"shape must be {list(hidden_states.shape[:2])} like the rows of hidden_states"
        check.fail(name, wanted, list(mask.shape), "one entry for each row")


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the rows that a mask selects.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: [batch, seqlen], bool or int: 1 where a token is.
        unused_mask: [batch, seqlen]: 1 where a row is allocated (and packed) but not in use.

    Returns:
        Rows [total, ...] selected by either mask; int64 indices [total] of them in [batch * seqlen]; int32 cu_seqlens
        [batch + 1]; the longest sequence's length (read back: one synchronisation); int32 [batch] rows in use.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
    selected = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = selected.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = selected.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cumulative(lengths), longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs batch rows that each hold several sequences one behind the other.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask_in_length: int [batch, seqlen]: the lengths of a row's sequences, in order, then zeros. For
            example [[2, 3, 0, 0, 0, 0]] is a sequence of 2 tokens, one of 3, and a token of padding.

    Returns:
        Rows [total, ...], int64 indices [total], int32 cu_seqlens [sequences + 1], the longest sequence's length.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    filled = attention_mask_in_length.sum(dim=-1)
    position = torch.arange(attention_mask_in_length.shape[-1], device=filled.device)
    indices = (position < filled[:, None]).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()].int()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cumulative(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: rows [total, ...] to [batch, seqlen, ...], zeros where there was none."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
