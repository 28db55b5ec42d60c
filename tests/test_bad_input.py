"""Every refusal says which argument, what was wanted, what came, and what to do."""

import re

import numpy as np
import pytest
import torch
from helpers import cumulative, random_qkv

from flash_attn import (
    _library,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_unpadded_qkvpacked_split_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    modes,
)
from flash_attn.flash_attention import FlashAttention
from flash_attn.flash_attn_interface import _flash_attn_backward, flash_attn_gpu
from flash_attn.modules import MHA, FlashAttentionLayer
from flash_attn.ops.triton.rotary import apply_rotary

Q = torch.zeros(2, 5, 4, 8)
SLOPES = torch.zeros(4)
PADDED = {
    "q: must be a torch.Tensor, got list": {"q": [1.0]},
    "q: must have 4 dimensions [batch, seqlen, heads, head_dim], got shape [5, 4, 8]": {"q": Q[0]},
    "q: layout must be strided": {"q": Q.to_sparse()},
    "q: dtype must be float16, bfloat16, float32 or float64, got torch.int64": {"q": Q.long()},
    "q: head_dim must be at most 256, got 320 (pad or split the heads)": {"q": torch.zeros(2, 5, 4, 320)},
    "q: needs at least one head and one element": {"q": Q[..., :0]},
    "k: dtype must be that of q, torch.float32, got torch.float64": {"k": Q.double()},
    "k: device must be that of q, cpu, got meta": {"k": Q.to("meta")},
    "v: device must be that of q, cpu, got meta": {"v": Q.to("meta")},
    "k: head_dim must be that of q, 8, got 7": {"k": Q[..., :7]},
    "k: batch must be that of q, 2, got 1": {"k": Q[:1]},
    "v: shape must be that of k, [2, 5, 4, 8], got [2, 3, 4, 8]": {"v": Q[:, :3]},
    "k: its heads must divide the 4 heads of q, got 3": {"k": Q[:, :, :3], "v": Q[:, :, :3]},
    "k: its heads must divide the 4 heads of q, got 8": {"k": Q.repeat(1, 1, 2, 1), "v": Q.repeat(1, 1, 2, 1)},
    "dropout_p: must be at least 0 and below 1, got 1.0": {"dropout_p": 1.0},
    "dropout_p: must be at least 0 and below 1, got -0.1": {"dropout_p": -0.1},
    "dropout_p: must be finite, got nan": {"dropout_p": float("nan")},
    "dropout_p: must be a number, got NoneType": {"dropout_p": None},
    "softmax_scale: must be finite, got inf": {"softmax_scale": float("inf")},
    "softmax_scale: must be a number, got str": {"softmax_scale": "1"},
    "softmax_scale: must be a number, got a tensor of shape [2]": {"softmax_scale": torch.ones(2)},
    "softcap: must be 0 (off) or positive, got -1.0": {"softcap": -1.0},
    "window_size: must be a pair (left, right), got int": {"window_size": 3},
    "window_size left: must be -1 (no bound) or at least 0, got -2": {"window_size": (-2, 0)},
    "window_size right: must be an int, got float": {"window_size": (0, 1.5)},
    "alibi_slopes: must be a torch.Tensor or None, got list": {"alibi_slopes": [0.1] * 4},
    "alibi_slopes: dtype must be torch.float32, got torch.float64": {"alibi_slopes": SLOPES.double()},
    "alibi_slopes: shape must be [4] or [2, 4], got [3]": {"alibi_slopes": SLOPES[:3]},
    "alibi_slopes: device must be that of q, cpu, got meta": {"alibi_slopes": SLOPES.to("meta")},
    "alibi_slopes: has no gradient": {"alibi_slopes": torch.zeros(4, requires_grad=True)},
    "s_aux: must be a torch.Tensor or None, got float": {"s_aux": 0.5},
    "s_aux: dtype must be floating, got torch.int64": {"s_aux": SLOPES.long()},
    "s_aux: shape must be [4], got [2, 4]": {"s_aux": torch.zeros(2, 4)},
    "s_aux: device must be that of q, cpu, got meta": {"s_aux": SLOPES.to("meta")},
}


@pytest.mark.parametrize("message", PADDED)
def test_padded(message):
    arguments = {"q": Q, "k": Q, "v": Q} | PADDED[message]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        flash_attn_func(**arguments)
    assert re.search(r"\(.+\)$", str(caught.value)), "the message ends with a way out"


AT = torch.tensor([0, 3, 5], dtype=torch.int32)
ROWS = torch.zeros(5, 4, 8)
PACKED = {
    "q: must have 3 dimensions [total, heads, head_dim], got shape [2, 5, 4, 8]": {"q": Q},
    "cu_seqlens_q: must be a torch.Tensor, got list": {"cu_seqlens_q": [0, 5]},
    "cu_seqlens_q: dtype must be torch.int32, got torch.int64": {"cu_seqlens_q": AT.long()},
    "cu_seqlens_q: device must be that of q, cpu, got meta": {"cu_seqlens_q": AT.to("meta")},
    "cu_seqlens_q: shape must be [n], got [1, 3]": {"cu_seqlens_q": AT[None]},
    "cu_seqlens_q: needs batch + 1 entries, got 0": {"cu_seqlens_q": AT[:0]},
    "cu_seqlens_q: must start with 0, got 1": {"cu_seqlens_q": AT + 1},
    "cu_seqlens_k: must not decrease, got [0, 4, 3]": {"cu_seqlens_k": torch.tensor([0, 4, 3], dtype=torch.int32)},
    "cu_seqlens_k: last entry must be at most the 5 rows there are, got 6": {
        "cu_seqlens_k": torch.tensor([0, 3, 6], dtype=torch.int32)
    },
    "cu_seqlens_k: must have 3 entries like cu_seqlens_q, got 2": {"cu_seqlens_k": AT[:2]},
    "max_seqlen of cu_seqlens_q: must be at least the longest sequence, 3, got 2": {"max_seqlen_q": 2},
    "max_seqlen_k: must be an int or a 0-d integer tensor, got float": {"max_seqlen_k": 3.0},
    "max_seqlen_k: must be an int or a 0-d integer tensor, got torch.int64 [1]": {"max_seqlen_k": torch.tensor([3])},
    "max_seqlen_k: must be at least 0, got -1": {"max_seqlen_k": -1},
    "v: shape must be that of k": {"v": ROWS[:4]},
}


@pytest.mark.parametrize("message", PACKED)
def test_packed(message):
    arguments = {
        "q": ROWS,
        "k": ROWS,
        "v": ROWS,
        "cu_seqlens_q": AT,
        "cu_seqlens_k": AT,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    } | PACKED[message]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        flash_attn_varlen_func(**arguments)
    assert re.search(r"\(.+\)$", str(caught.value)), "the message ends with a way out"


PAGES = torch.zeros(4, 2, 4, 8)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
PAGED = {
    "k: must have 4 dimensions [num_blocks, page_size, heads, head_dim]": {"k": ROWS},
    "block_table: dtype must be torch.int32": {"block_table": TABLE.long()},
    "block_table: batch must be 2, got 1": {"block_table": TABLE[:1]},
    "block_table: must have pages for 3 keys, 2 pages of 2, got 1 pages": {"block_table": TABLE[:, :1]},
    "block_table: entries must lie in [0, 3], got [1, 9]": {
        "block_table": TABLE.clone().fill_(1).index_fill_(1, torch.tensor([1]), 9)
    },
    "block_table: must be a torch.Tensor": {"block_table": [[0]]},
}


@pytest.mark.parametrize("message", PAGED)
def test_paged(message):
    arguments = {"q": ROWS, "k": PAGES, "v": PAGES, "block_table": TABLE} | PAGED[message]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        flash_attn_varlen_func(**arguments, cu_seqlens_q=AT, cu_seqlens_k=AT, max_seqlen_q=3, max_seqlen_k=3)


CACHE = {
    "k_cache: batch must be that of q, 2, got 3": {
        "k_cache": torch.zeros(3, 9, 4, 8),
        "v_cache": torch.zeros(3, 9, 4, 8),
    },
    "v: must come with the other of k, v": {"k": Q[:, :1]},
    "k: heads must be those of the cache, 4, got 2": {"k": Q[:, :1, :2], "v": Q[:, :1, :2], "cache_seqlens": 1},
    "cache_seqlens: must be given with k and v": {"k": Q[:, :1], "v": Q[:, :1]},
    "cache_seqlens: must lie in [0, 8], got 9": {"k": Q[:, :1], "v": Q[:, :1], "cache_seqlens": 9},
    "cache_seqlens: entries must lie in [0, 9], got [3, 10]": {
        "cache_seqlens": torch.tensor([3, 10], dtype=torch.int32)
    },
    "cache_seqlens: must be an int, an int32 tensor or None, got float": {"cache_seqlens": 2.0},
    "k: must fit into the cache, got 1 rows too many": {
        "k": torch.zeros(2, 10, 4, 8),
        "v": torch.zeros(2, 10, 4, 8),
        "cache_seqlens": 0,
    },
    "cache_batch_idx: entries must lie in [0, 1], got [0, 2]": {
        "cache_batch_idx": torch.tensor([0, 2], dtype=torch.int32)
    },
    "cache_batch_idx: must be None with block_table": {"cache_batch_idx": AT[:2], "block_table": TABLE},
    "cache_leftpad: entries must lie in [0, 9], got [0, 11]": {
        "cache_leftpad": torch.tensor([0, 11], dtype=torch.int32)
    },
    "rotary_cos: needs k, v and cache_seqlens": {"rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 4)},
    "rotary_cos: must have the cache's 9 rows, got 3": {
        "rotary_cos": torch.zeros(3, 4),
        "rotary_sin": torch.zeros(3, 4),
        "k": Q[:, :1],
        "v": Q[:, :1],
        "cache_seqlens": 2,
    },
    "rotary_cos: must be a torch.Tensor, got NoneType": {
        "rotary_sin": torch.zeros(9, 4),
        "k": Q[:, :1],
        "v": Q[:, :1],
        "cache_seqlens": 2,
    },
    "rotary_sin: dtype must be floating, got torch.int64": {
        "rotary_cos": torch.zeros(9, 4),
        "rotary_sin": torch.zeros(9, 4, dtype=torch.int64),
        "k": Q[:, :1],
        "v": Q[:, :1],
        "cache_seqlens": 2,
    },
    "block_table: must have 2 dimensions [batch, pages], got shape [2]": {"block_table": TABLE[:, 0]},
    "block_table: entries must lie in [0, 1], got [2, 3]": {"block_table": TABLE[1:].expand(2, -1)},
    "num_splits: must be an int, 0 or positive, got -1": {"num_splits": -1},
}


@pytest.mark.parametrize("message", CACHE)
def test_cache(message):
    cache = torch.zeros(2, 9, 4, 8)
    arguments = {"q": Q, "k_cache": cache, "v_cache": cache.clone()} | CACHE[message]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        flash_attn_with_kvcache(**arguments)


def test_numbers_of_numpy_are_numbers():
    arguments = {"cu_seqlens_q": AT, "cu_seqlens_k": AT, "max_seqlen_k": 3}
    got = flash_attn_varlen_func(
        ROWS,
        ROWS,
        ROWS,
        **arguments,
        max_seqlen_q=np.int64(3),
        softmax_scale=np.float32(0.5),
        window_size=(np.int32(1), 0),
    )
    expected = flash_attn_varlen_func(
        ROWS, ROWS, ROWS, **arguments, max_seqlen_q=3, softmax_scale=0.5, window_size=(1, 0)
    )
    assert torch.equal(got, expected)


SPLIT = {
    "batch_size0: must be an int, got float": (3, 2, 1.0),
    "batch_size0: must lie between 0 and the batch, 2, got 3": (3, 2, 3),
    "max_seqlen of cu_seqlens of the first part: must be at least the longest sequence, 3, got 2": (2, 3, 1),
    "max_seqlen of cu_seqlens of the second part: must be at least the longest sequence, 2, got 1": (3, 1, 1),
}


@pytest.mark.parametrize("message", SPLIT)
def test_split_batch(message):
    qkv = torch.zeros(5, 3, 4, 8)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        flash_attn_unpadded_qkvpacked_split_func(qkv, AT, *SPLIT[message], 0.0)


def test_packed_layouts():
    with pytest.raises(ValueError, match=re.escape("qkv: dimension -3 must be 3, got shape [2, 5, 2, 4, 8]")):
        flash_attn_qkvpacked_func(torch.zeros(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match="kv: must have 5 dimensions"):
        flash_attn_kvpacked_func(Q, Q)


PLACE = torch.zeros(2, 5, 4, 8)
LSE = torch.zeros(2, 4, 5)
LOW_LEVEL_FORWARD = {
    "out: must be torch.float32 [2, 5, 4, 8] on cpu like q, got torch.float16 [2, 5, 4, 8] on cpu": {
        "out": PLACE.half()
    },
    "out: must be torch.float32 [2, 5, 4, 8] on cpu like q, got torch.float32 [3, 2, 5, 4, 8] on cpu": {
        "out": PLACE.expand(3, -1, -1, -1, -1)
    },
}


@pytest.mark.parametrize("message", LOW_LEVEL_FORWARD)
def test_low_level_forward(message):
    settings = (0.0, 0.2, False, -1, -1, 0.0, False, None)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        flash_attn_gpu.fwd(Q, Q, Q, LOW_LEVEL_FORWARD[message]["out"], None, *settings)


LOW_LEVEL_BACKWARD = {
    "dout: must be a torch.Tensor, got NoneType": {"dout": None},
    "dout: must be torch.float32 [2, 5, 4, 8] on cpu like q, got torch.float32 [2, 4, 4, 8]": {"dout": Q[:, :4]},
    "out: must be torch.float32 [2, 5, 4, 8] on cpu like q, got torch.float16 [2, 5, 4, 8]": {"out": Q.half()},
    "softmax_lse: must be a torch.Tensor, got NoneType": {"softmax_lse": None},
    "softmax_lse: must have 3 dimensions [batch, heads, seqlen], got shape [4, 5]": {"softmax_lse": LSE[0]},
    "dq: must be a torch.Tensor, got list": {"dq": [1.0]},
    "dk: must be torch.float32 [2, 5, 4, 8] on cpu like k, got torch.float32 [2, 5, 4, 8] on meta": {
        "dk": Q.to("meta")
    },
    "rng_state: must be what the forward returned when dropout_p > 0, got None": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("message", LOW_LEVEL_BACKWARD)
def test_low_level_backward(message):
    tensors = {"dout": Q, "q": Q, "k": Q, "v": Q, "out": Q, "softmax_lse": LSE, "dq": None, "dk": None, "dv": None}
    settings = {
        "dropout_p": 0.0,
        "softmax_scale": 0.2,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
    }
    others = {"softcap": 0.0, "alibi_slopes": None, "deterministic": False}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        _flash_attn_backward(**(tensors | settings | others | LOW_LEVEL_BACKWARD[message]))


X, ANGLES = torch.zeros(2, 5, 32), torch.zeros(9, 4)
MODULES = {
    "hidden_states: last dimension must be hidden_size, 32, got 31": lambda: FlashAttentionLayer(32, 4)(X[..., :31]),
    "attention_mask: must be a torch.Tensor or None, got list": lambda: FlashAttentionLayer(32, 4)(X, [[1] * 5] * 2),
    "x_kv: must be None without cross_attn": lambda: MHA(32, 4)(X, x_kv=X),
    "dropout_p: must be at least 0 and below 1, got 1.5": lambda: FlashAttention(attention_dropout=1.5),
    "cos: device must be that of the rotated tensor, cpu, got meta": lambda: apply_rotary(
        Q, ANGLES.to("meta"), ANGLES.to("meta")
    ),
    "cos: rotary_dim must be at most head_dim, 8, got 10": lambda: apply_rotary(
        Q, torch.zeros(9, 5), torch.zeros(9, 5)
    ),
    "sin: shape must be that of cos, [9, 4], got [8, 4]": lambda: apply_rotary(Q, ANGLES, ANGLES[:8]),
    "seqlen_offsets: must be an int or a tensor of ints, got float": lambda: apply_rotary(Q, ANGLES, ANGLES, 1.0),
    "seqlen_offsets: must hold ints of shape [2], got torch.int64 [3]": lambda: apply_rotary(
        Q, ANGLES, ANGLES, torch.zeros(3, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("message", MODULES)
def test_modules(message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        MODULES[message]()


def test_float64_on_a_gpu(cuda_only):
    with pytest.raises(ValueError, match="float64 runs on the CPU only"):
        flash_attn_func(*random_qkv(cuda_only, torch.float64))


def test_values_on_a_gpu_are_checked_in_debug_mode(cuda_only, monkeypatch):
    q, k, v = (torch.zeros(5, 4, 8, device=cuda_only) for _ in range(3))
    at = cumulative([3, 3], cuda_only)
    monkeypatch.setenv(modes.DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="last entry must be at most"):
        flash_attn_varlen_func(q, k, v, at, at, 3, 3)


def test_bad_lengths_on_a_gpu_stay_within_the_tensors(cuda_only):
    """Not checked without the debug mode, as that would wait for the device; and yet nothing outside is touched."""
    q, k, v = (torch.ones(64, 4, 32, device=cuda_only) for _ in range(3))
    for lengths in ([0, 40, 1000], [0, 50, 20], [-30, 10, 64], [5, 5, 5]):
        at = torch.tensor(lengths, dtype=torch.int32, device=cuda_only)
        flash_attn_varlen_func(q, k, v, at, at, 64, 64, causal=True)
    torch.cuda.synchronize()
    assert (q == 1).all() and (k == 1).all() and (v == 1).all()


def test_missing_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_library, "_problem", "the compiled library _C.abi3.so is missing from here")
    with pytest.raises(RuntimeError, match=r"_C.abi3.so is missing.*pip install"):
        flash_attn_func(Q, Q, Q)


def test_library_of_another_version_is_recognised(monkeypatch):
    monkeypatch.setattr(_library, "_EXPECTED", {"forward": "q k v", "backward": _library.BACKWARD_ARGUMENTS})
    assert "this Python layer expects (q k v)" in _library._schema_problem()


def test_operators_check_too(device):
    """Called directly, below the checks of this package's Python: the library refuses by itself."""
    q, k, v = random_qkv(device, torch.float32)
    arguments = [q, k, v, *[None] * 6, 37, 37, 0.2, -1, -1, 0.0, 0.0, 0, False, False, False]
    for position, bad in (
        (1, k[..., :3]),
        (2, v[:, :5]),
        (1, k[:1]),
        (7, torch.zeros(3, device=device)),
        (14, -1.0),
        (15, 2.0),
    ):
        broken = list(arguments)
        broken[position] = bad
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.flash_attn.forward(*broken)
