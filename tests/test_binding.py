"""The operators themselves, as someone who bypasses the Python layer calls them: refusals, empty inputs, views."""

import pytest
import torch
from torch import Tensor

OPS = torch.ops.flash_attn
INFINITY = float("inf")


def attend(q: Tensor, k: Tensor, v: Tensor, **changes) -> tuple[Tensor, Tensor, Tensor]:
    """flash_attn::forward with everything off but what `changes` names."""
    packed = "cu_seqlens_q" in changes
    arguments = {
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "seqused_k": None,
        "alibi_slopes": None,
        "sink": None,
        "rng_state": None,
        "max_seqlen_q": q.shape[0 if packed else 1],
        "max_seqlen_k": k.shape[0 if packed else 1],
        "softmax_scale": 0.5,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "split_size": 0,
        "performance_mode": False,
        "return_s_dmask": False,
        "deterministic": False,
        **changes,
    }
    return OPS.forward(q, k, v, *arguments.values())


def differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, into: tuple[Tensor, ...], **changes
) -> Tensor:
    """flash_attn::backward likewise; fills `into`, returns delta."""
    arguments = {
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "seqused_k": None,
        "alibi_slopes": None,
        "sink": None,
        "rng_state": None,
        "max_seqlen_q": q.shape[1] if q.dim() == 4 else q.shape[0],
        "max_seqlen_k": k.shape[1] if k.dim() == 4 else k.shape[0],
        "softmax_scale": 0.5,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "deterministic": False,
        "performance_mode": False,
    }
    dlse = changes.pop("dlse", None)
    return OPS.backward(dout, dlse, q, k, v, out, lse, *into, *{**arguments, **changes}.values())


def inputs(device: str, seqlen_q: int = 7, seqlen_k: int = 9, head_dim: int = 16, dtype=torch.float32):
    """q [2, seqlen_q, 4, head_dim]; k and v [2, seqlen_k, 2, head_dim]."""
    make = {"device": device, "dtype": dtype}
    q = torch.randn(2, seqlen_q, 4, head_dim, **make)
    return q, torch.randn(2, seqlen_k, 2, head_dim, **make), torch.randn(2, seqlen_k, 2, head_dim, **make)


def ends(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class TestRefusals:
    """Each names the argument first and says what it got."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda q, k, v: (q.int(), k, v), r"^q: dtype must be .*got int32"),
            (lambda q, k, v: (q, k.double(), v), r"^k: dtype must be float32, got float64"),
            (lambda q, k, v: (q, k, v.half()), r"^v: dtype must be float32, got float16"),
            (lambda q, k, v: (q[0], k, v), r"^q: must have 4 dimensions.*got \[7, 4, 16\]"),
            (lambda q, k, v: (q, k[0], v), r"^k: must have 4 dimensions"),
            (lambda q, k, v: (q, k, v[:, 1:]), r"^v: shape must be k's, \[2, 9, 2, 16\], got \[2, 8, 2, 16\]"),
            (lambda q, k, v: (q, k[:1], v[:1]), r"^k: batch must be q's, 2, got 1"),
            (lambda q, k, v: (q[..., :8], k, v), r"^k: head_dim must be q's"),
            (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), r"^q: head_dim must be at least 1, got 0"),
            (lambda q, k, v: (q[:, :, :3], k, v), r"^k: heads must divide q's heads, got 2"),
            (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), r"^k: heads must divide q's heads, got 0"),
            (
                lambda q, k, v: (q[..., ::2], k[..., :8], v[..., :8]),
                r"^q: the last dimension's stride must be 1, got 2",
            ),
        ],
    )
    def test_tensors(self, change, message):
        with pytest.raises(ValueError, match=message):
            attend(*change(*inputs("cpu")))

    def test_a_head_too_wide(self, device):
        with pytest.raises(ValueError, match=r"^q: head_dim must be at most 256, got 257 \(split the heads\)"):
            attend(*inputs(device, head_dim=257))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seqused_k": torch.ones(2)}, r"^seqused_k: dtype must be int32"),
            ({"seqused_k": torch.tensor([3, 10], dtype=torch.int32)}, r"^seqused_k: .*length 9, got 10"),
            ({"seqused_k": torch.tensor([3, -1], dtype=torch.int32)}, r"^seqused_k: .*got -1"),
            ({"alibi_slopes": torch.ones(3)}, r"^alibi_slopes: shape must be \[4\], got \[3\]"),
            ({"alibi_slopes": torch.ones(3, 4)}, r"^alibi_slopes: shape must be \[2, 4\]"),
            ({"alibi_slopes": torch.ones(4, 2).T}, r"^alibi_slopes: must be contiguous"),
            ({"alibi_slopes": torch.ones(4).double()}, r"^alibi_slopes: dtype must be float32"),
            ({"sink": torch.ones(2)}, r"^sink: shape must be \[4\]"),
            ({"sink": torch.ones(4).double()}, r"^sink: dtype must be float32, got float64"),
            ({"dropout_p": 0.5}, r"^rng_state: must be given exactly when dropout_p > 0, got None"),
            ({"rng_state": torch.zeros(2, dtype=torch.int64)}, r"^rng_state: .*got a tensor"),
            ({"dropout_p": 1.0, "rng_state": torch.zeros(2, dtype=torch.int64)}, r"^dropout_p: .*below 1"),
            ({"dropout_p": 0.5, "rng_state": torch.zeros(3, dtype=torch.int64)}, r"^rng_state: shape must be \[2\]"),
            ({"softcap": -1.0}, r"^softcap: must be at least 0"),
            ({"softcap": float("nan")}, r"^softcap: must be at least 0, got nan"),
            ({"split_size": -1}, r"^split_size: must be at least 0, got -1"),
            ({"split_size": 7}, r"split_size.*multiple"),
            ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, r"^cu_seqlens_k: .*exactly when cu_seqlens_q is"),
        ],
    )
    def test_the_rest(self, changes, message):
        with pytest.raises(ValueError, match=message):
            attend(*inputs("cpu"), **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cu_seqlens_q": ends("cpu", 0, 4, 8)}, r"^cu_seqlens_q: must end at most at the tensor's 7 rows, got 8"),
            ({"cu_seqlens_q": ends("cpu", 1, 4, 7)}, r"^cu_seqlens_q: must start with 0, got 1"),
            ({"cu_seqlens_q": ends("cpu", 0, 4, 2)}, r"^cu_seqlens_q: must not descend"),
            ({"cu_seqlens_q": ends("cpu", 0, 4, 7).long()}, r"^cu_seqlens_q: dtype must be int32, got int64"),
            ({"cu_seqlens_k": ends("cpu", 0, 9)}, r"^cu_seqlens_k: shape must be \[3\], got \[2\]"),
            ({"cu_seqlens_k": ends("cpu", 0, 2, 19)}, r"^cu_seqlens_k"),
            ({"max_seqlen_q": 3}, r"^cu_seqlens_q: sequences must be at most max_seqlen = 3 long, got 4"),
            ({"max_seqlen_k": 4}, r"^cu_seqlens_k: sequences must be at most max_seqlen = 4 long, got 5"),
            ({"max_seqlen_q": 0}, r"^max_seqlen_q: must be at least 1"),
            ({"max_seqlen_k": -1}, r"^max_seqlen_k: must be between 0 and 2\^30, got -1"),
        ],
    )
    def test_packed(self, changes, message):
        q, k, v = (tensor[0] for tensor in inputs("cpu"))
        good = {"cu_seqlens_q": ends("cpu", 0, 4, 7), "cu_seqlens_k": ends("cpu", 0, 5, 9)}
        attend(q, k, v, **good)
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, **{**good, **changes})

    def test_float64_on_a_gpu(self, cuda_only):
        with pytest.raises(ValueError, match=r"^q: dtype must be float16, bfloat16 or float32 on a GPU"):
            attend(*inputs(cuda_only, dtype=torch.float64))

    def test_devices_do_not_mix(self, cuda_only):
        q, k, v = inputs(cuda_only)
        with pytest.raises(ValueError, match=r"^v: must be on cuda:0 like q, got cpu"):
            attend(q, k, v.cpu())

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("dq", lambda q, k: torch.empty_like(k), r"^dq: shape must be q's"),
            ("dk", lambda q, k: torch.empty_like(q), r"^dk: shape must be k's"),
            ("dv", lambda q, k: k.new_zeros(1).expand(k.shape), r"^dv: the last dimension's stride must be 1, got 0"),
            ("dv", lambda q, k: k.new_zeros(1, 1, 1, 16).expand(k.shape), r"^dv: elements must not share memory"),
            (
                "dk",
                lambda q, k: k.new_zeros(9999).as_strided(k.shape, (16, 16, 16, 1)),
                r"^dk: elements must not share",
            ),
            ("dq", lambda q, k: torch.empty_like(q).half(), r"^dq: dtype must be float32, got float16"),
        ],
    )
    def test_gradients(self, name, value, message):
        q, k, v = inputs("cpu")
        out, lse, _ = attend(q, k, v)
        into = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v), name: value(q, k)}
        with pytest.raises(ValueError, match=message):
            differentiate(out, q, k, v, out, lse, tuple(into.values()))

    def test_the_backward_s_other_inputs(self):
        q, k, v = inputs("cpu")
        out, lse, _ = attend(q, k, v)
        into = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        with pytest.raises(ValueError, match=r"^dout: shape must be q's"):
            differentiate(out[:, 1:], q, k, v, out, lse, into)
        with pytest.raises(ValueError, match=r"^softmax_lse: shape must be \[2, 4, 7\], got \[2, 4, 6\]"):
            differentiate(out, q, k, v, out, lse[..., 1:], into)
        with pytest.raises(ValueError, match=r"^dlse: dtype must be float32"):
            differentiate(out, q, k, v, out, lse, into, dlse=lse.double())

    def test_names(self):
        with pytest.raises(ValueError, match=r"^device: must be cpu or cuda, got xpu"):
            OPS.key_block("xpu", "float16", 64)
        with pytest.raises(ValueError, match=r"^dtype: .*got int8"):
            OPS.key_block("cpu", "int8", 64)
        with pytest.raises(ValueError, match=r"^head_dim: must be between 1 and 256, got 0"):
            OPS.key_block("cpu", "float16", 0)


class TestEmpty:
    def test_no_keys(self, device):
        q, k, v = inputs(device, seqlen_k=0)
        out, lse, s_dmask = attend(q, k, v, return_s_dmask=True)
        assert torch.equal(out, torch.zeros_like(q)) and torch.equal(lse, torch.full_like(lse, INFINITY))
        assert s_dmask.shape == (2, 4, 7, 0)
        sink = torch.arange(4.0, device=device)
        out, lse, _ = attend(q, k, v, sink=sink)
        assert torch.equal(out, torch.zeros_like(q)) and torch.equal(lse, sink[:, None].expand(2, 4, 7))

    def test_no_keys_packed(self, device):
        q, k, v = (tensor[0] for tensor in inputs(device, seqlen_k=0))
        sequences = {"cu_seqlens_q": ends(device, 0, 7), "cu_seqlens_k": ends(device, 0, 0)}
        out, lse, _ = attend(q, k, v, **sequences)
        assert torch.equal(out, torch.zeros_like(q)) and lse.shape == (4, 7) and bool((lse == INFINITY).all())

    @pytest.mark.parametrize("seqlen_k", [0, 9])
    def test_no_queries(self, device, seqlen_k):
        q, k, v = inputs(device, seqlen_q=0, seqlen_k=seqlen_k)
        out, lse, _ = attend(q, k, v)
        assert out.shape == q.shape and lse.shape == (2, 4, 0)
        into = (torch.ones_like(q), torch.ones_like(k), torch.ones_like(v))
        delta = differentiate(out, q, k, v, out, lse, into)
        assert delta.shape == lse.shape and not any(bool(gradient.any()) for gradient in into)

    def test_no_batch(self, device):
        q, k, v = (tensor[:0] for tensor in inputs(device))
        out, lse, _ = attend(q, k, v)
        assert out.shape == q.shape and lse.shape == (0, 4, 7)
        q, k, v = (tensor[0] for tensor in inputs(device))
        none = ends(device, 0)
        out, lse, _ = attend(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none)
        assert torch.equal(out, torch.zeros_like(q))

    def test_gradients_without_keys(self, device):
        q, k, v = inputs(device, seqlen_k=0)
        out, lse, _ = attend(q, k, v)
        into = (torch.ones_like(q), torch.ones_like(k), torch.ones_like(v))
        delta = differentiate(torch.ones_like(out), q, k, v, out, lse, into, dlse=torch.full_like(lse, 3.0))
        assert torch.equal(into[0], torch.zeros_like(q)) and torch.equal(delta, torch.full_like(lse, -3.0))

    def test_rows_that_belong_to_no_sequence(self):
        """On the CPU, where the boundaries can be read: zero, as if they saw no key."""
        q, k, v = (tensor[0] for tensor in inputs("cpu"))
        sequences = {"cu_seqlens_q": ends("cpu", 0, 5), "cu_seqlens_k": ends("cpu", 0, 6)}
        out, lse, _ = attend(q, k, v, **sequences)
        assert (
            out[:5].all() and torch.equal(out[5:], torch.zeros_like(out[5:])) and bool((lse[:, 5:] == INFINITY).all())
        )
        into = tuple(torch.full_like(tensor, float("nan")) for tensor in (q, k, v))
        delta = differentiate(torch.ones_like(out), q, k, v, out, lse, into, **sequences)
        dq, dk, dv = into
        assert not any(bool(rest.any()) for rest in (dq[5:], dk[6:], dv[6:], delta[:, 5:]))
        alone = (torch.empty_like(q[:5]), torch.empty_like(k[:6]), torch.empty_like(v[:6]))
        differentiate(
            torch.ones_like(out[:5]), q[:5], k[:6], v[:6], out[:5], lse[:, :5].contiguous(), alone, **sequences
        )
        assert all(torch.equal(whole[: len(part)], part) for whole, part in zip(into, alone, strict=True))


class TestWindows:
    @pytest.mark.parametrize("bounds", [(8, 6), (2**31, 2**40), (-1, 6), (8, -1), (2**62, 2**62)])
    def test_one_that_hides_nothing_is_none(self, device, bounds):
        """However wide: positions are ints inside the kernels."""
        q, k, v = inputs(device)
        left, right = bounds
        bounded = attend(q, k, v, window_left=left, window_right=right)
        assert all(torch.equal(a, b) for a, b in zip(bounded, attend(q, k, v), strict=True))

    @pytest.mark.parametrize("bounds", [(7, -1), (-1, 5)])
    def test_one_that_hides_a_corner_is_not(self, device, bounds):
        q, k, v = inputs(device)
        left, right = bounds
        assert not torch.equal(attend(q, k, v, window_left=left, window_right=right)[0], attend(q, k, v)[0])


class TestViews:
    @pytest.mark.parametrize("head_dim", [16, 13])
    def test_gradients_into_one_packed_tensor(self, device, head_dim):
        q, k, v = (torch.randn(2, 6, 3, head_dim, device=device) for _ in range(3))
        qkv = torch.stack((q, k, v), dim=2)  # [2, 6, 3, 3, head_dim]
        out, lse, _ = attend(q, k, v)
        strided = attend(*qkv.unbind(2))
        assert torch.equal(strided[0], out) and torch.equal(strided[1], lse)
        plain = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        dqkv = torch.full_like(qkv, float("nan"))
        differentiate(out, q, k, v, out, lse, plain, deterministic=True)
        differentiate(out, *qkv.unbind(2), out, lse, dqkv.unbind(2), deterministic=True)
        assert torch.equal(dqkv, torch.stack(plain, dim=2))

    def test_expanded_inputs(self, device):
        q, k, v = inputs(device)
        k, v = (tensor[:1].expand(2, -1, -1, -1) for tensor in (k, v))
        copies = attend(q, k.contiguous(), v.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(attend(q, k, v), copies, strict=True))

    def test_an_unaligned_start(self, device):
        q, k, v = inputs(device)
        moved = tuple(torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(attend(*moved), attend(q, k, v), strict=True))


def test_symbolic_sizes(device):
    """max_seqlen and the window are SymInt: one compiled graph serves several lengths."""
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, window_left=q.shape[1] - 3)[0],
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for seqlen_q in (7, 5, 6):
        q, k, v = inputs(device, seqlen_q=seqlen_q)
        assert torch.equal(compiled(q, k, v), attend(q, k, v, window_left=seqlen_q - 3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_of_the_tensors_is_used(cuda_only, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")

    def results(q, k, v):
        out, lse, _ = attend(q, k, v)
        gradients = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        differentiate(out, q, k, v, out, lse, gradients, deterministic=True)
        return out, lse, *gradients

    mine = inputs("cuda:1", 150, 300, head_dim=64, dtype=dtype)
    assert torch.cuda.current_device() == 0
    found, expected = results(*mine), results(*(tensor.to("cuda:0") for tensor in mine))
    assert all(tensor.device == mine[0].device for tensor in found)
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))
    assert torch.cuda.current_device() == 0


class TestAppend:
    """flash_attn::append, to which no cache length and no page is too wrong."""

    @staticmethod
    def problem(device, **changes):
        """Two new rows of two sequences, two heads; a cache of three pages of four."""
        step = {name: torch.randn(2, 2, 2, 16, device=device) for name in "qkv"}
        arguments = {
            **step,
            "k_cache": torch.zeros(3, 4, 2, 16, device=device),
            "v_cache": torch.zeros(3, 4, 2, 16, device=device),
            "cache_seqlens": ends(device, 0, 3),
            "block_table": torch.tensor([[2, 1], [0, 1]], dtype=torch.int32, device=device),
            "rotary_cos": None,
            "rotary_sin": None,
            "interleaved": False,
            "queries_advance": True,
        }
        return {**arguments, **changes}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q": torch.zeros(2, 2, 16)}, r"^q: must have 4 dimensions"),
            ({"q": torch.zeros(2, 2, 2, 300)}, r"^q: head_dim must be between 1 and 256, got 300"),
            ({"q": torch.zeros(2, 2, 2, 16, dtype=torch.int32)}, r"^q: dtype must be .*got int32"),
            ({"k": torch.zeros(1, 2, 2, 16)}, r"^k: batch must be q's, got 1"),
            ({"v": torch.zeros(2, 3, 2, 16)}, r"^v: shape must be \[2, 2, 2, 16\]"),
            ({"v": torch.zeros(2, 2, 2, 16).half()}, r"^v: dtype must be float32, got float16"),
            ({"k_cache": torch.zeros(3, 4, 1, 16)}, r"^k_cache: heads and head_dim must be k's, \[2, 16\]"),
            ({"k_cache": torch.zeros(1, 4, 2, 16).expand(3, 4, 2, 16)}, r"^k_cache: elements must not share memory"),
            ({"v_cache": torch.zeros(3, 5, 2, 16)}, r"^v_cache: shape must be"),
            ({"block_table": None}, r"^k_cache: batch must be q's, got 3"),
            ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, r"^block_table: must have a row for each of 2"),
            ({"block_table": torch.zeros(2, 2)}, r"^block_table: dtype must be int32"),
            ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, r"^cache_seqlens: shape must be \[2\]"),
            ({"rotary_cos": torch.zeros(8, 4)}, r"^rotary_sin: must be given exactly when"),
            ({"rotary_cos": torch.zeros(8, 9), "rotary_sin": torch.zeros(8, 9)}, r"^rotary_cos: rotary_dim must be"),
            ({"rotary_cos": torch.zeros(8, 4), "rotary_sin": torch.zeros(9, 4)}, r"^rotary_sin: shape must be"),
            ({"rotary_cos": torch.zeros(0, 4), "rotary_sin": torch.zeros(0, 4)}, r"^rotary_cos: must have 1 to 2\^30"),
            (
                {"rotary_cos": torch.zeros(8, 4).half(), "rotary_sin": torch.zeros(8, 4).half()},
                r"^rotary_cos: dtype must be float32, got float16",
            ),
        ],
    )
    def test_refusals(self, changes, message):
        with pytest.raises(ValueError, match=message):
            OPS.append(*self.problem("cpu", **changes).values())

    def test_pages_and_lengths(self, device):
        arguments = self.problem(device)
        rotated, after = OPS.append(*arguments.values())
        assert rotated.numel() == 0 and after.tolist() == [2, 5]
        for name in "kv":
            cache, new = arguments[f"{name}_cache"], arguments[name]
            assert torch.equal(cache[2, :2], new[0])
            assert torch.equal(torch.stack([cache[0, 3], cache[1, 0]]), new[1])
            assert not cache[0, :3].any() and not cache[1, 1:].any() and not cache[2, 2:].any()

    @pytest.mark.parametrize("lengths", [(-1, 8), (7, -(2**31)), (2**31 - 3, 9)])
    @pytest.mark.parametrize("page", [3, -1, 2**31 - 1])
    def test_nothing_outside_the_cache_is_written(self, device, lengths, page):
        around = torch.zeros(2, 5, 4, 2, 16, device=device)
        table = torch.full((2, 2), page, dtype=torch.int32, device=device)
        table[0, 0], table[0, 1] = 0, 2
        arguments = self.problem(device, k_cache=around[0, 1:4], v_cache=around[1, 1:4], block_table=table)
        tables = {"rotary_cos": torch.ones(2, 4, device=device), "rotary_sin": torch.ones(2, 4, device=device)}
        OPS.append(*{**arguments, **tables, "cache_seqlens": ends(device, *lengths)}.values())
        written = {-1: (0, 0), 7: (2, 3)}.get(lengths[0])  # the row of one of the first sequence's two keys
        for cache in around:
            assert not cache[0].any() and not cache[4].any()
            if written is not None:
                assert cache[1:4][written].any()
                cache[1:4][written] = 0
            assert not cache.any()

    def test_no_rows(self, device):
        empty = {name: torch.zeros(2, 0, 2, 16, device=device) for name in "kv"}
        arguments = self.problem(device, **empty)
        assert OPS.append(*arguments.values())[1].tolist() == [0, 3]
        assert not arguments["k_cache"].any()
