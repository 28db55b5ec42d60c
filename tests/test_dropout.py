"""Dropout: which probabilities it drops, that it repeats under a seed, and that the backward drops the same."""

import itertools

import pytest
import torch
from helpers import (
    assert_accurate,
    assert_forward_accurate,
    assert_gradients_accurate,
    exact,
    feature,
    gradients,
    longest,
    random_packed,
    random_qkv,
)

from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn._ops import Options, Tensors, forward
from flash_attn.reference import attention_reference


@pytest.mark.parametrize("name", ["full", "causal", "everything"])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_forward_and_backward_apply_the_mask_that_s_dmask_shows(device, dtype, name, dim):
    p = 0.25  # exact in float32, which is what kernels hold it in
    q, k, v = random_qkv(device, dtype, seqlen_q=150, seqlen_k=190, heads_kv=2, dim=dim, grad=True)
    arguments = feature(name, q)
    out, lse, s_dmask = flash_attn_func(q, k, v, dropout_p=p, return_attn_probs=True, **arguments)
    keep = ~torch.signbit(s_dmask)
    arguments |= {"dropout_p": p, "dropout_mask": keep}
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected, plain = exact(*inputs, **arguments), attention_reference(q, k, v, **arguments)
    assert_forward_accurate((out, lse), plain, expected)
    assert_accurate(s_dmask.abs(), plain.probabilities.to(dtype), expected.probabilities, "S_dmask")
    dout = torch.randn(out.shape).to(out)
    found, rough = gradients(out, (q, k, v), dout), gradients(plain.out, (q, k, v), dout)
    wanted = gradients(expected.out, inputs, dout.double())
    assert_gradients_accurate(found, rough, wanted, (q, k, v), dout / (1.0 - p), arguments.get("softmax_scale"))


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_asking_for_s_dmask_changes_no_bits(device, dtype, dim):
    q, k, v = random_qkv(device, dtype, seqlen_q=150, seqlen_k=190, dim=dim)
    torch.manual_seed(2)
    out, _, _ = flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
    torch.manual_seed(2)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.3, causal=True), out)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-7 (Salmon et al., SC 2011)."""
    for _ in range(7):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            right >> 32 ^ counter[1] ^ key[0],
            right & 0xFFFFFFFF,
            left >> 32 ^ counter[3] ^ key[1],
            left & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter


def test_bits_are_philox(device):
    """As docs/numerics.md says; the generator itself as Random123's known answers do."""
    assert philox([0] * 4, [0] * 2) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    seed, offset, p, heads = 0x123456789ABCDEF, 0x76543210FEDCBA98, 0.3, 2
    q, k, v = random_qkv(device, torch.float32, seqlen_q=40, seqlen_k=50, heads_q=heads, dim=32)
    state = torch.tensor([seed, offset], device=device)
    options = Options(40, 50, 1.0, dropout_p=p, return_s_dmask=True)
    _, _, s_dmask = forward(q, k, v, Tensors(rng_state=state), options)
    dropped = torch.signbit(s_dmask).tolist()
    key = [(seed ^ offset >> 32) & 0xFFFFFFFF, seed >> 32]
    for sequence, row, column in itertools.product(range(q.shape[0] * heads), range(40), range(50)):
        place = [row // 16 * 8 + row % 8, column // 16 * 4 + column % 8 // 2, sequence, offset & 0xFFFFFFFF]
        pair = philox(place, key)[row % 16 // 8 * 2 + column % 16 // 8]
        bits = pair >> 16 * (column % 2) & 0xFFFF
        found = dropped[sequence // heads][sequence % heads][row][column]
        assert found == (bits >= round((1 - p) * 65536)), (sequence, row, column)


def test_packed(device):
    lengths_q, lengths_k = [5, 30, 17], [40, 30, 2]
    q, k, v, where = random_packed(device, torch.float32, lengths_q, lengths_k)
    arguments = {**where, **longest(lengths_q, lengths_k), "dropout_p": 0.4, "return_attn_probs": True}
    out, _, s_dmask = flash_attn_varlen_func(q, k, v, **arguments)
    assert s_dmask.shape == (3, 4, 30, 40)
    expected = exact(q, k, v, **where, dropout_p=0.4, dropout_mask=~torch.signbit(s_dmask))
    assert torch.allclose(out.double(), expected.out, atol=2e-6)  # twice the float32 contract: 1 / (1 - p) < 2


def test_share_dropped_is_p(device):
    q, k, v = random_qkv(device, torch.float32, 4, 128, heads_q=8)
    for p in (0.1, 0.5, 0.9):
        _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=p, return_attn_probs=True)
        count = s_dmask.numel()
        share = float(torch.signbit(s_dmask).sum()) / count
        # Six standard deviations of a binomial share: a false alarm once in 10^9 seeds, and the seed is fixed.
        assert abs(share - p) < 6.0 * (p * (1.0 - p) / count) ** 0.5


def test_masks_differ_between_heads_batches_rows_and_columns(device):
    """Neighbours agree as often as independent draws do: p = 1/2 gives half, within six standard deviations."""
    q, k, v = random_qkv(device, torch.float32, 4, 128, heads_q=4)
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    dropped = torch.signbit(s_dmask)
    for dimension in range(4):
        agree = dropped == dropped.roll(1, dimension)
        share = float(agree.float().mean())
        assert abs(share - 0.5) < 6.0 * 0.5 / agree.numel() ** 0.5, dimension


def test_seed_repeats_and_calls_differ(device):
    q, k, v = random_qkv(device, torch.float32)
    torch.manual_seed(3)
    first, second = (flash_attn_func(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_packed_layouts_draw_the_same_mask(device):
    qkv = torch.randn(2, 40, 3, 4, 32, device=device)
    torch.manual_seed(5)
    expected = flash_attn_func(*qkv.unbind(2), dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, dropout_p=0.3), expected)


def test_no_generator_use_without_dropout(device):
    q, k, v = random_qkv(device, torch.float32)
    torch.manual_seed(7)
    flash_attn_func(q, k, v)
    drawn = torch.rand(3, device=device)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3, device=device))


def test_by_differences_on_the_real_kernels():
    q, k, v = random_qkv("cpu", torch.float64, 1, 5, 4, heads_q=2, dim=3, grad=True)

    def run(*inputs):
        torch.manual_seed(11)  # the same mask in every evaluation
        return flash_attn_func(*inputs, dropout_p=0.3)

    assert torch.autograd.gradcheck(run, (q, k, v))
