"""The modules, the rotary layer, the cross entropy and the SDPA hook."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, error, random_qkv

from flash_attn import sdpa
from flash_attn.flash_attention import FlashAttention, FlashMHA
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules import MHA, FlashAttentionCore, FlashAttentionLayer, FlashCrossAttention, FlashSelfAttention
from flash_attn.modules.mha import get_alibi_slopes
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn.reference import attention_reference

# float32 outputs of order 1 after projections of 64 terms: sums in another order.
PROJECTED = 5e-6


def test_core_trains_like_torch(device):
    core = FlashAttentionCore(16, causal=True)
    q, k, v = (torch.randn(2, 3, 21, 16, device=device, requires_grad=True) for _ in range(3))
    out, expected = core(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.shape == q.shape and error(out, expected) < PROJECTED
    dout = torch.randn(2, 3, 21, 16, device=device)
    found, wanted = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected))
    assert all(error(a, b) < PROJECTED for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="head_dim must be the module's, 16"):
        core(q[..., :8], k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_kind", [None, "left", "holes"])
def test_layer_fast_and_dense_paths_agree(device, causal, mask_kind):
    layer = FlashAttentionLayer(64, 4, causal=causal).to(device)
    x = torch.randn(2, 19, 64, device=device)
    mask = None
    if mask_kind == "left":
        mask = torch.arange(19, device=device)[None] >= torch.tensor([[0], [6]], device=device)
    elif mask_kind == "holes":
        mask = (torch.rand(2, 19, device=device) > 0.3).int()
    fast = layer(x, mask)
    dense, attention = layer(x, mask, return_attention=True)
    assert error(fast, dense) < PROJECTED
    assert attention.shape == (2, 4, 19, 19)
    rows = attention.sum(-1)
    sees = torch.ones(2, 19, dtype=torch.bool, device=device) if mask is None else mask != 0
    # float32 sums of at most 19 probabilities
    assert error(rows, sees[:, None].expand_as(rows).float()) < 1e-6


def test_layer_with_a_full_mask(device):
    layer = FlashAttentionLayer(64, 4).to(device)
    x = torch.randn(2, 9, 64, device=device)
    mask = torch.rand(2, 9, 9, device=device) > 0.4
    out, attention = layer(x, mask, return_attention=True)
    assert (attention.masked_select(~mask[:, None].expand_as(attention)) == 0).all()
    assert error(layer(x, mask), out) == 0.0
    assert error(layer(x, mask[:, None]), out) == 0.0
    with pytest.raises(ValueError, match="attention_mask: shape must be"):
        layer(x, mask[:, :4])
    with pytest.raises(ValueError, match="attention_mask: dtype must be bool or int"):
        layer(x, mask.float())


def test_layer_dropout_only_in_training(device):
    layer = FlashAttentionLayer(64, 4, dropout=0.5).to(device)
    x = torch.randn(1, 9, 64, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_layer_learns(device):
    """The previous token is attention's to find: a small layer drives the loss well below that of guessing."""
    torch.manual_seed(0)
    layer = FlashAttentionLayer(32, 2, causal=True).to(device)
    embed = torch.nn.Embedding(8, 32).to(device)
    where = torch.nn.Embedding(12, 32).to(device)
    head = torch.nn.Linear(32, 8).to(device)
    parameters = [p for module in (layer, embed, where, head) for p in module.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(80):
        tokens = torch.randint(8, (16, 12)).to(device)
        hidden = layer(embed(tokens) + where.weight[None])
        loss = F.cross_entropy(head(hidden[:, 1:]).flatten(0, 1), tokens[:, :-1].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5 * math.log(8)


@pytest.mark.parametrize("causal", [False, True])
def test_version_0_2_modules(device, causal):
    module = FlashMHA(64, 4, causal=causal, device=device)
    x = torch.randn(2, 13, 64, device=device)
    qkv = module.Wqkv(x).view(2, 13, 3, 4, 16)
    plain = attention_reference(*qkv.unbind(2), causal=causal).out
    out, weights = module(x)
    assert weights is None and error(out, module.out_proj(plain.flatten(-2))) < PROJECTED
    keep = torch.ones(2, 13, dtype=torch.bool, device=device)
    keep[1, 9:] = False
    masked, _ = module.inner_attn(qkv, key_padding_mask=keep, causal=causal)
    expected = attention_reference(*qkv[1:, :9].unbind(2), causal=causal).out
    assert error(masked[1:, :9], expected) < PROJECTED
    assert torch.equal(masked[1, 9:], torch.zeros_like(masked[1, 9:]))
    at = torch.tensor([0, 13, 22], dtype=torch.int32, device=device)
    packed, _ = FlashAttention()(qkv[keep], cu_seqlens=at, max_s=13, causal=causal)
    assert torch.equal(packed, masked[keep])
    with pytest.raises(ValueError, match="need_weights: must be False"):
        module(x, need_weights=True)


def test_mha_self_and_cross(device):
    x, other = torch.randn(2, 11, 64, device=device), torch.randn(2, 17, 64, device=device)
    module = MHA(64, 4, num_heads_kv=2, causal=True, use_alibi=True, device=device)
    q, k, v = module.Wqkv(x).split([64, 32, 32], dim=-1)
    q, k, v = q.unflatten(-1, (4, 16)), k.unflatten(-1, (2, 16)), v.unflatten(-1, (2, 16))
    slopes = torch.tensor(get_alibi_slopes(4), device=device)
    expected = module.out_proj(attention_reference(q, k, v, causal=True, alibi_slopes=slopes).out.flatten(-2))
    assert error(module(x), expected) < PROJECTED
    packed = module(
        x.flatten(0, 1), cu_seqlens=torch.tensor([0, 11, 22], dtype=torch.int32, device=device), max_seqlen=11
    )
    assert error(packed.view_as(expected), expected) < PROJECTED

    cross = MHA(64, 4, cross_attn=True, return_residual=True, device=device)
    q = cross.Wq(x).unflatten(-1, (4, 16))
    k, v = cross.Wkv(other).unflatten(-1, (2, 4, 16)).unbind(2)
    out, residual = cross(x, other)
    assert residual is x
    assert error(out, cross.out_proj(attention_reference(q, k, v).out.flatten(-2))) < PROJECTED


def test_mha_decodes_with_a_cache_as_it_attends_at_once(device):
    module = MHA(64, 4, num_heads_kv=2, causal=True, layer_idx=0, rotary_emb_dim=16, device=device).eval()
    x = torch.randn(2, 9, 64, device=device)
    with torch.no_grad():
        whole = module(x)
        cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, max_seqlen=9, max_batch_size=2)
        parts = []
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            cache.seqlen_offset = begin
            parts.append(module(x[:, begin:end], inference_params=cache))
    assert error(torch.cat(parts, 1), whole) < PROJECTED


def test_mha_gradients_reach_every_parameter(device):
    module = MHA(64, 4, num_heads_kv=2, rotary_emb_dim=8, device=device)
    module(torch.randn(2, 9, 64, device=device)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_inner_modules(device):
    qkv = torch.randn(2, 13, 3, 4, 16, device=device)
    expected = attention_reference(*qkv.unbind(2), causal=True).out
    assert error(FlashSelfAttention(causal=True)(qkv), expected) < PROJECTED
    assert error(FlashCrossAttention()(qkv[:, :, 0], qkv[:, :, 1:], causal=True), expected) < PROJECTED


def test_alibi_slopes_of_the_paper():
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(12) == [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_rotation_by_complex_numbers(interleaved):
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(20, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[5:12, None]
    pairs = x[..., :8].unflatten(-1, (4, 2)) if interleaved else x[..., :8].unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    expected = torch.cat([turned, x[..., 8:]], -1)
    arguments = (angle.cos(), angle.sin())
    out = apply_rotary_emb(x, *arguments, interleaved, seqlen_offsets=5)
    assert error(out, expected) < 1e-15 * 10  # a few float64 roundings of order 1
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x, *arguments, interleaved, seqlen_offsets=5), (x,))
    back = apply_rotary(out, *arguments, 5, interleaved=interleaved, conjugate=True)
    assert error(back, x) < 1e-15 * 10
    place = x.detach().clone()
    assert apply_rotary_emb(place, *arguments, interleaved, inplace=True, seqlen_offsets=5) is place
    assert torch.equal(place, out)


def test_rotary_of_packed_rows():
    x = torch.randn(9, 2, 8)
    angle = torch.rand(30, 4)
    at, offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.tensor([3, 0, 11], dtype=torch.int32)
    out = apply_rotary(x, angle.cos(), angle.sin(), offsets, at, 5)
    first = apply_rotary(x[None, :4], angle.cos(), angle.sin(), 3)[0]
    last = apply_rotary(x[None, 4:], angle.cos(), angle.sin(), 11)[0]
    assert torch.equal(out, torch.cat([first, last]))
    with pytest.raises(ValueError, match="cos: must have rows for positions 28 to 32, got 30"):
        apply_rotary(x[None, :4], angle.cos(), angle.sin(), 28)


def test_rotary_embedding_layer(device):
    layer = RotaryEmbedding(16, device=device)
    qkv = torch.randn(2, 9, 3, 4, 32, device=device)
    expected = qkv.clone()
    angle = torch.outer(torch.arange(9.0), 10000.0 ** -(torch.arange(0, 16, 2) / 16)).to(device)
    for slot in (0, 1):
        expected[:, :, slot] = apply_rotary_emb(qkv[:, :, slot], angle.cos(), angle.sin())
    packed = qkv.clone()
    assert layer(packed) is packed and error(packed, expected) < 1e-6  # float32 angles of order 10, computed twice
    q, kv = layer(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone())
    assert torch.equal(q, packed[:, :, 0]) and torch.equal(kv, packed[:, :, 1:])
    grouped = torch.cat([qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]], 2)
    grouped = layer(grouped, num_heads_q=4)
    assert torch.equal(grouped, torch.cat([packed[:, :, 0], packed[:, :, 1, :2], packed[:, :, 2, :2]], 2))


def test_xpos_scores_depend_on_distance_only():
    layer = RotaryEmbedding(16, scale_base=64.0)
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    rows = torch.cat([q, k, k], 2)[:, :, None].transpose(2, 3).expand(1, 12, 3, 1, 16).clone()
    turned = layer(rows)
    scores = torch.einsum("bihd,bjhd->bhij", turned[:, :, 0], turned[:, :, 1])[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        assert error(diagonal, diagonal[:1].expand_as(diagonal)) < 1e-5  # the tables are computed in float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_scale", [0.0, 1e-2])
@pytest.mark.parametrize("inplace", [False, True])
def test_cross_entropy(smoothing, z_scale, inplace):
    logits = torch.randn(6, 11, dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([3, 0, -100, 10, 5, 5])
    weights = torch.randn(6)
    wide = logits.detach().double().requires_grad_()
    plain = F.cross_entropy(2.0 * wide, labels, reduction="none", label_smoothing=smoothing)
    z = z_scale * torch.logsumexp(2.0 * wide, -1).square().masked_fill(labels == -100, 0.0)
    ((plain + z) * weights.double()).sum().backward()
    losses, z_losses = cross_entropy_loss(
        logits * 1.0,
        labels,
        label_smoothing=smoothing,
        logit_scale=2.0,
        lse_square_scale=z_scale,
        inplace_backward=inplace,
    )
    (losses * weights).sum().backward()
    assert error(losses, plain + z) < 1e-5 and error(z_losses, z) < 1e-5  # float32 sums of 11 terms of order 5
    assert error(logits.grad, wide.grad) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_functions(device, causal):
    """The two functions torch would call, against torch's own answer."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in random_qkv(device, torch.float32, 2, 20, dim=16))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    dout = torch.randn(expected.shape).to(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), dout)
    with torch.no_grad():
        out, lse, *_, max_q, max_k, seed, offset, _ = sdpa.sdpa_forward(q, k, v, 0.0, causal)
        assert out.stride() == torch.empty_like(q).stride() and error(out, expected) < PROJECTED
        found = sdpa.sdpa_backward(dout, q, k, v, out, lse, None, None, max_q, max_k, 0.0, causal, seed, offset)
    assert all(error(a, b) < PROJECTED for a, b in zip(found, wanted, strict=True))


def test_sdpa_registration_activates_nothing():
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        with pytest.raises(RuntimeError, match="install torch"):
            sdpa.register()
        return
    sdpa.register("flash_attn_test")
    assert "flash_attn_test" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None


@pytest.mark.skipif("cuda" not in DEVICES, reason="torch dispatches to flash implementations on GPUs only")
def test_sdpa_with_this_package(monkeypatch):
    q, k, v = (torch.randn(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    calls = []
    forward = sdpa.sdpa_forward

    def counting(*arguments, **options):
        calls.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(sdpa, "sdpa_forward", counting)
    sdpa.register("flash_attn_test")
    torch.nn.attention.activate_flash_attention_impl("flash_attn_test")
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.sum().backward()
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert calls and q.grad.isfinite().all()
    expected = attention_reference(*(x.detach().transpose(1, 2).double() for x in (q, k, v)), causal=True).out
    assert error(out.transpose(1, 2), expected) < 2 * torch.finfo(torch.bfloat16).eps  # P, then the result, rounded
