"""What clients inspect: names, order and defaults of arguments, import paths, the version."""

import inspect
import re
from importlib import import_module

import pytest
import torch
from helpers import cumulative, gradients, random_packed, random_qkv

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn import flash_attn_interface as interface

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
WINDOW = "window_size_left, window_size_right, softcap, alibi_slopes"
UNPADDED = "dropout_p, softmax_scale=None, causal=False, return_attn_probs=False"

# flash-attn 2.8.3's, with s_aux behind; flash_attn_unpadded_*: 0.2.8's.
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}, s_aux=None",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {COMMON}, block_table=None, s_aux=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    "flash_attn_unpadded_func": f"q, k, v, {LENGTHS}, {UNPADDED}",
    "flash_attn_unpadded_kvpacked_func": f"q, kv, {LENGTHS}, {UNPADDED}",
    "flash_attn_unpadded_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {UNPADDED}",
    "flash_attn_unpadded_qkvpacked_split_func": (f"qkv, cu_seqlens, max_seqlen0, max_seqlen1, batch_size0, {UNPADDED}"),
    "_flash_attn_forward": f"q, k, v, dropout_p, softmax_scale, causal, {WINDOW}, return_softmax",
    "_flash_attn_varlen_forward": (
        f"q, k, v, {LENGTHS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
        "zero_tensors=False"
    ),
    "_flash_attn_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, {WINDOW}, deterministic, "
        "rng_state=None"
    ),
    "_flash_attn_varlen_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {LENGTHS}, dropout_p, softmax_scale, causal, {WINDOW}, "
        "deterministic, rng_state=None, zero_tensors=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    assert ", ".join(re.sub(r": .*?(?= =|$)", "", str(p)).replace(" = ", "=") for p in parameters) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", [name for name in SIGNATURES if not name.startswith("_")])
def test_public_names(name):
    assert getattr(flash_attn, name) is getattr(interface, name)
    assert name in flash_attn.__all__


@pytest.mark.parametrize(
    "path",
    [
        "flash_attn.bert_padding:unpad_input",
        "flash_attn.bert_padding:pad_input",
        "flash_attn.bert_padding:index_first_axis",
        "flash_attn.bert_padding:rearrange",
        "flash_attn.flash_attention:FlashAttention",
        "flash_attn.flash_attention:FlashMHA",
        "flash_attn.layers.rotary:RotaryEmbedding",
        "flash_attn.layers.rotary:apply_rotary_emb",
        "flash_attn.modules.mha:MHA",
        "flash_attn.ops.triton.rotary:apply_rotary",
        "flash_attn.ops.triton.cross_entropy:cross_entropy_loss",
        "flash_attn.flash_attn_interface:_wrapped_flash_attn_forward",
        "flash_attn.flash_attn_interface:_wrapped_flash_attn_backward",
        "flash_attn_2_cuda:varlen_bwd",
        "flash_attn_2_cuda:fwd_kvcache",
    ],
)
def test_import_paths(path):
    module, name = path.split(":")
    assert callable(getattr(import_module(module), name))


def test_version_passes_the_gates_of_clients():
    assert re.fullmatch(r"2\.8\.3\.post\d+", flash_attn.__version__)
    assert flash_attn.__version__ > "2.6.3"  # some compare strings


COUNTS = {"fwd": 13, "varlen_fwd": 21, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}


@pytest.mark.parametrize("name", COUNTS)
def test_low_level_argument_counts(name):
    function = getattr(interface.flash_attn_gpu, name)
    assert len(inspect.signature(function).parameters) == COUNTS[name]
    assert getattr(import_module("flash_attn_2_cuda"), name) is function


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_low_level_padded(device, dropout_p):
    """Called by position, as clients with an autograd of their own do."""
    q, k, v = random_qkv(device, torch.float32, seqlen_q=20, seqlen_k=30, heads_kv=2, grad=True)
    torch.manual_seed(4)
    expected, lse, s_dmask = flash_attn_func(
        q, k, v, dropout_p, 0.2, True, (11, -1), 0.0, None, True, return_attn_probs=True
    )
    dout = torch.randn(expected.shape).to(expected)
    wanted = gradients(expected, (q, k, v), dout)
    with torch.no_grad():
        torch.manual_seed(4)
        result = interface._wrapped_flash_attn_forward(q, k, v, dropout_p, 0.2, True, 11, -1, 0.0, None, True)
        assert all(torch.equal(a, b) for a, b in zip(result, (expected, lse, s_dmask), strict=False))
        out, lse, _, rng_state = result
        torch.manual_seed(4)
        place = torch.empty_like(out)
        again = interface.flash_attn_gpu.fwd(q, k, v, place, None, dropout_p, 0.2, True, 11, -1, 0.0, True, None)
        assert again[0] is place and torch.equal(place, out)

        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        delta = interface._wrapped_flash_attn_backward(
            dout, q, k, v, out, lse, dq, dk, dv, dropout_p, 0.2, True, 11, -1, 0.0, None, True, rng_state
        )
        assert all(torch.equal(a, b) for a, b in zip((dq, dk, dv), wanted, strict=True))
        # rowsum(dout * out) of 32 float32 products, in another order.
        assert torch.allclose(delta, (dout * out).sum(-1).transpose(1, 2), atol=1e-5)
        found = interface.flash_attn_gpu.bwd(
            dout, q, k, v, out, lse, None, None, None, None, dropout_p, 0.2, True, 11, -1, 0.0, True, None, rng_state
        )
        assert all(torch.equal(a, b) for a, b in zip(found, (*wanted, delta), strict=True))


def test_low_level_packed(device):
    lengths_q, lengths_k = [7, 20], [30, 20]
    q, k, v, where = random_packed(device, torch.float32, lengths_q, lengths_k, grad=True)
    expected, lse, _ = flash_attn_varlen_func(
        q, k, v, **where, max_seqlen_q=20, max_seqlen_k=30, causal=True, deterministic=True, return_attn_probs=True
    )
    dout = torch.randn(expected.shape).to(expected)
    wanted = gradients(expected, (q, k, v), dout)
    at = where["cu_seqlens_q"], where["cu_seqlens_k"]
    scale = q.shape[-1] ** -0.5
    with torch.no_grad():
        out, out_lse, _, rng = interface._flash_attn_varlen_forward(q, k, v, *at, 20, 30, 0.0, scale, True)
        assert torch.equal(out, expected) and torch.equal(out_lse, lse)
        flags = (0.0, scale, False, True, -1, -1, 0.0)
        result = interface.flash_attn_gpu.varlen_fwd(
            q, k, v, None, *at, None, None, None, None, 20, 30, *flags, False, None
        )
        assert torch.equal(result[0], expected)
        found = interface.flash_attn_gpu.varlen_bwd(
            dout, q, k, v, out, lse, None, None, None, *at, None, 20, 30, *flags, True, None, rng
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=False))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        interface._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, *at, 20, 30, 0.0, scale, True, -1, -1, 0.0, None, True
        )
        assert all(torch.equal(a, b) for a, b in zip((dq, dk, dv), wanted, strict=True))


def test_low_level_packed_with_used_keys(device):
    q, k, v, where = random_packed(device, torch.float32, [7, 20], [30, 20])
    used = torch.tensor([12, 20], dtype=torch.int32, device=device)
    out = interface._flash_attn_varlen_forward(q, k, v, *where.values(), 20, 30, 0.0, 0.2, True, seqused_k=used)[0]
    kept = [torch.cat([x[:12], x[30:]]) for x in (k, v)]
    at_k = cumulative([12, 20], device)
    expected = flash_attn_varlen_func(q, *kept, where["cu_seqlens_q"], at_k, 20, 20, 0.0, 0.2, True)
    assert torch.equal(out, expected)


def test_low_level_gradients_into_strided_memory(device):
    """Clients hand in views of one dqkv tensor, and transposed ones."""
    qkv = torch.randn(2, 20, 3, 4, 32, device=device)
    q, k, v = qkv.unbind(2)
    dout = torch.randn_like(q)
    settings = (0.0, 0.2, False, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *settings, False)
    wanted = interface.flash_attn_gpu.bwd(
        dout, q, k, v, out, lse, None, None, None, None, *settings[:-1], True, None, None
    )[:3]
    dqkv = torch.empty_like(qkv)
    interface._flash_attn_backward(dout, q, k, v, out, lse, *dqkv.unbind(2), *settings, True)
    assert all(torch.equal(a, b) for a, b in zip(dqkv.unbind(2), wanted, strict=True))
    odd = [torch.empty(2, 20, 32, 4, device=device).transpose(-1, -2) for _ in range(3)]
    interface._flash_attn_backward(dout, q, k, v, out, lse, *odd, *settings, True)
    assert all(torch.equal(a, b) for a, b in zip(odd, wanted, strict=True))
