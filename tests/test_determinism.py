"""The guarantees, by comparing bits: run to run, batch invariance, schedule invariance; and what the mode costs."""

import threading

import pytest
import torch
from helpers import feature, gradients, longest, random_packed, random_qkv

import flash_attn
from flash_attn import deterministic_mode, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, modes

MODES = ["causal", "causal_window", "everything"]


def split_for(device, dtype, dim=64):
    """The smallest split: one key block."""
    return modes.key_block(device, str(dtype).removeprefix("torch."), dim)


def run(q, k, v, dout, **arguments):
    """(out, lse, dq, dk, dv)."""
    out, lse, _ = flash_attn_func(q, k, v, **arguments, deterministic=True, return_attn_probs=True)
    return out.detach(), lse.detach(), *gradients(out, (q, k, v), dout)


def leaves(*inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", MODES)
def test_batch_does_not_matter(device, dtype, name, dim):
    q, k, v = random_qkv(device, dtype, 8, 70, 150, heads_kv=2, dim=dim)
    dout = torch.randn(q.shape).to(q)
    arguments = feature(name, q)
    whole = run(*leaves(q, k, v), dout, **arguments)
    for size in (4, 1):
        parts = [
            run(*leaves(*(x[b : b + size] for x in (q, k, v))), dout[b : b + size], **arguments)
            for b in range(0, 8, size)
        ]
        assert same(whole, [torch.cat(column) for column in zip(*parts, strict=True)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_large_batch_does_not_matter(cuda_only, dim, causal):
    """Heads enough that dQ's sums take the room of those that are done (docs/hopper.md)."""
    q, k, v = random_qkv(cuda_only, torch.bfloat16, 64, 300, heads_q=16, heads_kv=8, dim=dim)
    dout = torch.randn_like(q)
    whole = run(*leaves(q, k, v), dout, causal=causal)
    parts = [
        run(*leaves(*(x[b : b + 16] for x in (q, k, v))), dout[b : b + 16], causal=causal) for b in range(0, 64, 16)
    ]
    assert same(whole, [torch.cat(column) for column in zip(*parts, strict=True)])


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_short_tiles_do_not_overtake(cuda_only, dim):
    """A tile with one block of keys is soon done: the next one's Q must not arrive where this one's is still read."""
    elsewhere = torch.empty(100_000_000, dtype=torch.uint8, device=cuda_only)
    for batch in (16, 32):
        q, k, v = random_qkv(cuda_only, torch.bfloat16, batch, 300, heads_q=16, heads_kv=8, dim=dim)
        first = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2]
        differing = torch.zeros((), dtype=torch.int64, device=cuda_only)
        for _ in range(300):
            again = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2]
            for a, b in zip(first, again, strict=True):
                differing += (a != b).any()
            elsewhere.zero_()  # inputs leave the cache, and tiles arrive at different times
        assert differing == 0


def test_heads_do_not_matter(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, 70, 150, heads_q=6, heads_kv=3)
    dout = torch.randn(q.shape).to(q)
    out, lse, dq, dk, dv = run(*leaves(q, k, v), dout, causal=True)
    for head in range(3):
        mine, kv_mine = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        alone = run(*leaves(q[:, :, mine], k[:, :, kv_mine], v[:, :, kv_mine]), dout[:, :, mine], causal=True)
        slices = out[:, :, mine], lse[:, mine], dq[:, :, mine], dk[:, :, kv_mine], dv[:, :, kv_mine]
        assert same(alone, slices)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_other_queries_do_not_matter(device, dtype, dim):
    """Whether tiles are many or few, and whether they have a neighbour to share keys with."""
    q, k, v = random_qkv(device, dtype, 2, 700, 300, heads_kv=2, dim=dim)
    arguments = {"deterministic": True, "return_attn_probs": True}
    out, lse, _ = flash_attn_func(q, k, v, **arguments)
    for rows in (1, 128, 129, 300, 512):
        part, part_lse, _ = flash_attn_func(q[:, :rows], k, v, **arguments)
        assert torch.equal(part, out[:, :rows]), rows
        assert torch.equal(part_lse, lse[..., :rows]), rows


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_softcap_of_other_scores_does_not_matter(device, dtype, dim):
    """Scores within a part of softcap take a short cut on NVIDIA, if those beside them do."""
    q, k, v = random_qkv(device, dtype, 1, 70, 400, dim=dim)
    usual, _, _ = flash_attn_func(q, k, v, softcap=8.0, return_attn_probs=True)
    q[:, ::7] *= 10.0
    mixed, _, _ = flash_attn_func(q, k, v, softcap=8.0, return_attn_probs=True)
    others = [i for i in range(70) if i % 7]
    assert torch.equal(usual[:, others], mixed[:, others])
    assert not torch.equal(usual, mixed)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_packing_does_not_matter(device, dtype, dim):
    lengths_q, lengths_k = [70, 3, 231], [150, 64, 131]
    q, k, v, where = random_packed(device, dtype, lengths_q, lengths_k, dim=dim)
    dout = torch.randn(q.shape).to(q)
    inputs = leaves(q, k, v)
    arguments = {"causal": True, "deterministic": True, "return_attn_probs": True}
    out, lse, _ = flash_attn_varlen_func(*inputs, **where, **longest(lengths_q, lengths_k), **arguments)
    dq, dk, dv = gradients(out, tuple(inputs), dout)
    at_q = at_k = 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        rows, cols = slice(at_q, at_q + n), slice(at_k, at_k + m)
        alone = run(*leaves(q[rows][None], k[cols][None], v[cols][None]), dout[rows][None], causal=True)
        packed = out[rows], lse[:, rows], dq[rows], dk[cols], dv[cols]
        assert same([x[0] for x in alone], packed)
        at_q, at_k = at_q + n, at_k + m


def test_padding_does_not_matter(device, dtype):
    """A sequence in a longer cache, of which only a part is in use, against the sequence alone."""
    q, k, v = random_qkv(device, dtype, 2, 5, 300)
    with deterministic_mode(device != "cpu"):
        for used in (1, 64, 130, 299):
            alone = flash_attn_func(q, k[:, :used], v[:, :used], causal=True)
            assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True), alone)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", MODES)
def test_schedule_does_not_matter(device, dtype, name, blocks, dim):
    """A whole prefill, chunked prefills and single rows: the same bits."""
    split = blocks * split_for(device, dtype, dim)
    seqlen = 3 * split + 37
    q, k, v = random_qkv(device, dtype, 1, seqlen, heads_q=2, heads_kv=1, dim=dim)
    arguments = feature(name, q) | {"return_attn_probs": True}
    with deterministic_mode(True, split):
        out, lse, _ = flash_attn_func(q, k, v, **arguments)
        for chunk in (1, 50, split, seqlen - 1):
            ends = range(1, seqlen + 1, 13) if chunk == 1 else [*range(chunk, seqlen, chunk), seqlen]
            for end in ends:
                begin = max(0, end - chunk)
                part, part_lse, _ = flash_attn_func(q[:, begin:end], k[:, :end], v[:, :end], **arguments)
                assert torch.equal(part, out[:, begin:end]), (chunk, begin)
                assert torch.equal(part_lse, lse[..., begin:end]), (chunk, begin)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_later_values_do_not_matter(device, dim):
    """However large they are: float32 on Hopper scales weights by the values that a row sees."""
    split = 2 * split_for(device, torch.float32, dim)
    q, k, v = random_qkv(device, torch.float32, 1, 2 * split + 37, heads_q=2, dim=dim)
    v *= torch.exp2(torch.randint(-30, 31, (*v.shape[:3], 1)).to(v))
    with deterministic_mode(True, split):
        whole = flash_attn_func(q, k, v, causal=True)
        for end in range(1, q.shape[1] + 1, 7):
            row = flash_attn_func(q[:, end - 1 : end], k[:, :end], v[:, :end], causal=True)
            assert torch.equal(row, whole[:, end - 1 : end]), end


def test_decoding_equals_prefill(device, dtype):
    """Contiguous and paged decode steps, with a batch of sequences at different lengths, against one prefill."""
    split = split_for(device, dtype)
    q, k, v = random_qkv(device, dtype, 3, 2 * split + 9, heads_kv=2)
    seqlen = q.shape[1]
    page_size = 16
    pages = -(-seqlen // page_size)
    table = torch.randperm(3 * pages).view(3, pages)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * page_size - seqlen)) for x in (k, v)]
    paged = [torch.empty(3 * pages, page_size, 2, 64).to(q) for _ in range(2)]
    for cache, x in zip(paged, padded, strict=True):
        cache[table.flatten()] = x.reshape(3 * pages, page_size, 2, 64)
    table = table.int().to(device)
    with deterministic_mode(True, split):
        whole = flash_attn_func(q, k, v, causal=True)
        for lengths in ([1, split, seqlen], [split + 1, 2, 2 * split]):
            used = torch.tensor(lengths, dtype=torch.int32, device=device)
            row = torch.stack([q[b, n - 1 : n] for b, n in enumerate(lengths)])
            expected = torch.stack([whole[b, n - 1 : n] for b, n in enumerate(lengths)])
            settings = {"cache_seqlens": used, "causal": True}
            assert torch.equal(flash_attn_with_kvcache(row, k, v, **settings), expected)
            assert torch.equal(flash_attn_with_kvcache(row, *paged, **settings, block_table=table), expected)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("chunks", [2, 3, 9, 17])
@pytest.mark.parametrize("rows, batch, heads_q, heads_kv", [(1, 1, 8, 1), (1, 3, 8, 2), (5, 2, 2, 2), (16, 1, 2, 1)])
def test_few_rows_equal_many(device, dtype, rows, batch, heads_q, heads_kv, chunks, dim):
    """Thread blocks may share out the keys of few rows, and fold in clusters or by a kernel of its own; with more rows
    each folds as it goes. One sequence is empty, one ends within a chunk."""
    split = split_for(device, dtype, dim)
    q, k, v = random_qkv(device, dtype, batch, 40, chunks * split - 3, heads_q, heads_kv, dim)
    used = torch.tensor([k.shape[1], 0, split + 1], dtype=torch.int32, device=device)[:batch]
    with deterministic_mode(True, split):
        for settings in ({}, {"cache_seqlens": used}):
            settings = settings | {"return_softmax_lse": True}
            out, lse = flash_attn_with_kvcache(q, k, v, **settings)
            few, few_lse = flash_attn_with_kvcache(q[:, :rows], k, v, **settings)
            assert torch.equal(few, out[:, :rows]) and torch.equal(few_lse, lse[..., :rows])
    assert torch.allclose(
        few.float(), flash_attn_with_kvcache(q[:, :rows], k, v, cache_seqlens=used).float(), atol=0.02
    )


@pytest.mark.parametrize("rows", [1, 70])
def test_threads_do_not_matter(rows):
    """On the CPU they share the keys of few queries, in chunks of 2048 where no split_size is given."""
    q, k, v = random_qkv("cpu", torch.float32, 1, rows, 5000, heads_q=2, heads_kv=1)
    threads = torch.get_num_threads()
    found = []
    try:
        for count, split in ((1, None), (5, None), (1, 2048), (5, 2048)):
            torch.set_num_threads(count)
            with deterministic_mode(True, split):
                found.append(flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2])
    finally:
        torch.set_num_threads(threads)
    assert all(same(outputs, found[0]) for outputs in found)


def test_split_size_is_part_of_the_definition(device):
    """Not a hint: sums are associated differently, so some bits differ between split sizes, within rounding."""
    split = split_for(device, torch.float32)
    q, k, v = random_qkv(device, torch.float32, 2, 64, 4 * split)
    with deterministic_mode(True, split):
        small = flash_attn_func(q, k, v)
    with deterministic_mode(True, 2 * split):
        large = flash_attn_func(q, k, v)
    assert not torch.equal(small, large)
    assert torch.allclose(small, large, atol=1e-6)  # the float32 contract


@pytest.mark.parametrize("dim", [64, 256])
def test_backward_repeats_under_load(device, dtype, dim):
    q, k, v = random_qkv(device, dtype, 2, 200, 200, heads_kv=2, dim=dim, grad=True)
    dout = torch.randn(q.shape).to(q)
    stop = threading.Event()

    def load():
        x = torch.randn(128, 128, device=device)
        while not stop.is_set():
            x = torch.tanh(x @ x)

    worker = threading.Thread(target=load)
    worker.start()
    try:
        first = run(q, k, v, dout, causal=True)
        assert all(same(run(q, k, v, dout, causal=True), first) for _ in range(20))
    finally:
        stop.set()
        worker.join()


@pytest.mark.parametrize("how", ["argument", "mode", "environment"])
def test_every_switch_reaches_the_backward(monkeypatch, how):
    """The operator is told so, whichever switch is used; without one it is not."""
    seen = []
    backward = torch.ops.flash_attn.backward.default

    def spy(*arguments):
        seen.append(arguments[-2])
        return backward(*arguments)

    monkeypatch.setattr(torch.ops.flash_attn.backward, "default", spy)
    q, k, v = random_qkv("cpu", torch.float32, grad=True)
    flash_attn_func(q, k, v).sum().backward()
    if how == "mode":
        with deterministic_mode(True):
            out = flash_attn_func(q, k, v)
    else:
        if how == "environment":
            monkeypatch.setenv(modes.DETERMINISTIC_VARIABLE, "1")
        out = flash_attn_func(q, k, v, deterministic=how == "argument")
        monkeypatch.delenv(modes.DETERMINISTIC_VARIABLE, raising=False)
    out.sum().backward()  # what counts is the mode of the forward
    assert seen == [False, True]


VARIABLES = {
    modes.DETERMINISTIC_VARIABLE: modes.is_deterministic,
    modes.PERFORMANCE_VARIABLE: modes.is_performance_mode,
    modes.DEBUG_VARIABLE: modes.is_debug,
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_variables_are_0_or_1(monkeypatch, variable):
    for value in ("", "0", "1"):
        monkeypatch.setenv(variable, value)
        assert VARIABLES[variable]() is (value == "1")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{variable}: must be 0 or 1, got 'true'"):
        VARIABLES[variable]()


def test_mode_is_kept_and_restored():
    assert flash_attn.get_deterministic_mode() == (False, None)
    with deterministic_mode(True, 256):
        assert flash_attn.get_deterministic_mode() == (True, 256)
        with pytest.raises(KeyError), deterministic_mode(False):
            raise KeyError
        assert flash_attn.get_deterministic_mode() == (True, 256)
    assert flash_attn.get_deterministic_mode() == (False, None)


def test_bad_modes(device):
    for bad in (0, -64):
        with pytest.raises(ValueError, match="split_size: must be positive"):
            flash_attn.set_deterministic_mode(True, bad)
    with pytest.raises(ValueError, match="split_size: must be None with enabled=False"):
        flash_attn.set_deterministic_mode(False, 128)
    with pytest.raises(TypeError, match="enabled: must be a bool"):
        flash_attn.set_deterministic_mode(1)
    with pytest.raises(TypeError, match="split_size: must be an int"):
        flash_attn.set_deterministic_mode(True, 128.0)
    block = split_for(device, torch.float32)
    with deterministic_mode(True, block + 1), pytest.raises(ValueError, match="multiple of the key block"):
        flash_attn_func(*random_qkv(device, torch.float32))


def test_memory_of_the_mode(cuda_only):
    """At most 10% above the peak of the same call without it."""
    q, k, v = random_qkv(cuda_only, torch.bfloat16, 2, 2048, heads_q=8, dim=64, grad=True)

    def peak():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        flash_attn_func(q, k, v, causal=True).sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    peak()
    without = peak()
    with deterministic_mode(True, 512):
        assert peak() <= 1.1 * without


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_memory_of_the_backward(cuda_only, dim, deterministic):
    """On Hopper a tenth of the inputs beside the gradients, once they are large."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper's own loops use the room of sums again")
    q, k, v = random_qkv(cuda_only, torch.bfloat16, 16, 2048, heads_q=2048 // dim, dim=dim, grad=True)
    out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
    dout = torch.randn_like(out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = gradients(out, (q, k, v), dout)
    torch.cuda.synchronize()
    workspace = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    assert workspace <= 0.1 * sum(x.nbytes for x in (q, k, v, out, dout))
