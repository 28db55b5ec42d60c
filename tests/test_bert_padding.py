"""Packing and unpacking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from flash_attn.flash_attention import FlashAttention


def test_round_trip_and_lengths():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    x = torch.randn(3, 4, 2, 5)
    rows, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(rows, x[mask])
    assert indices.tolist() == [0, 1, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 2, 5, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and used.tolist() == [2, 3, 0]
    assert torch.equal(pad_input(rows, indices, 3, 4), x * mask[..., None, None])


def test_unused_rows_are_packed_but_not_counted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    spare = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    _, indices, cu_seqlens, longest, used = unpad_input(torch.randn(2, 4, 3), mask, spare)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6]
    assert cu_seqlens.tolist() == [0, 3, 6] and longest == 3 and used.tolist() == [2, 1]


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    rows, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(rows, x.flatten(0, 1)[indices])


def test_gradients_by_differences():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 3])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), (x,))
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x, indices, 6), (values,))


def test_masks_of_another_shape_are_refused():
    """They would select rows of other sequences."""
    x, mask, other = torch.zeros(2, 5, 8), torch.ones(2, 5), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"attention_mask: shape must be \[2, 5\] .* got \[2, 4\]"):
        unpad_input(x, other)
    with pytest.raises(ValueError, match="unused_mask: shape must be"):
        unpad_input(x, mask, other)
    with pytest.raises(ValueError, match="attention_mask_in_length: shape must be"):
        unpad_input_for_concatenated_sequences(x, other)
    with pytest.raises(ValueError, match="attention_mask: shape must be"):
        FlashAttention()(torch.zeros(2, 5, 3, 4, 8), key_padding_mask=other)


@pytest.mark.parametrize(
    ("pattern", "axes", "shape", "expected"),
    [
        ("b s ... -> (b s) ...", {}, (2, 3, 4, 5), (6, 4, 5)),
        ("(b s) ... -> b s ...", {"b": 2}, (6, 4), (2, 3, 4)),
        ("b s h d -> b s (h d)", {}, (2, 3, 4, 5), (2, 3, 20)),
    ],
)
def test_rearrange(pattern, axes, shape, expected):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert torch.equal(bert_padding.rearrange(x, pattern, **axes), x.reshape(expected))


def test_rearrange_of_stacked_positions():
    x = torch.randn(3, 2, 5, 4)
    rows = bert_padding.rearrange(x, "c b s ... -> (b s) c ...")
    assert torch.equal(rows, torch.stack([part.flatten(0, 1) for part in x], dim=1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_mask(rows):
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 3)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(pad_input(packed, indices, *mask.shape), x.masked_fill(~mask[..., None], 0.0))
    assert cu_seqlens.diff().tolist() == used.tolist() == mask.sum(1).tolist()
    assert longest == max(used.tolist())
