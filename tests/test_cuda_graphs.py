"""Capture and replay on a GPU."""

import torch
from helpers import random_qkv

from flash_attn import flash_attn_func, flash_attn_with_kvcache


def capture(function):
    """Warms up on a side stream, captures one call, returns (graph, result)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_forward_and_backward(cuda_only):
    q, k, v = random_qkv(cuda_only, torch.bfloat16, 2, 100, grad=True)
    dout = torch.randn(q.shape).to(q)

    def step():
        out = flash_attn_func(q, k, v, causal=True, deterministic=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    graph, captured = capture(step)
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_dropout_draws_afresh_at_every_replay(cuda_only):
    q, k, v = random_qkv(cuda_only, torch.bfloat16, 2, 100, grad=True)
    dout = torch.randn(q.shape).to(q)

    def step():
        out, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.5, deterministic=True, return_attn_probs=True)
        return out, s_dmask, *torch.autograd.grad(out, (q, k, v), dout)

    graph, captured = capture(step)
    graph.replay()
    first = [x.clone() for x in captured]
    graph.replay()
    second = [x.clone() for x in captured]
    assert not torch.equal(torch.signbit(first[1]), torch.signbit(second[1]))
    assert not torch.equal(first[2], second[2])  # the backward of a replay drops what its forward dropped
    torch.cuda.manual_seed(9)
    graph.replay()
    third = captured[0].clone()
    torch.cuda.manual_seed(9)
    graph.replay()
    assert torch.equal(captured[0], third)


def test_decoding_follows_the_lengths(cuda_only):
    k_cache, v_cache = (torch.randn(2, 300, 2, 64, device=cuda_only, dtype=torch.float16) for _ in range(2))
    q = torch.randn(2, 1, 4, 64, device=cuda_only, dtype=torch.float16)
    used = torch.tensor([5, 9], dtype=torch.int32, device=cuda_only)
    graph, out = capture(lambda: flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=used, causal=True))
    for lengths in ([5, 9], [299, 130]):
        used.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=used, causal=True))


def test_current_stream_is_honoured(cuda_only):
    """The kernel queues behind slow work on a side stream, so it sees what that work wrote."""
    q, k, v = random_qkv(cuda_only, torch.float16, 2, 200)
    expected = flash_attn_func(q, k, v)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = flash_attn_func(late, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)
