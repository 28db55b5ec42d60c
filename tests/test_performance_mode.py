"""The performance mode on the CPU: how accurate it is, that it is on, and that the guarantees hold in it."""

import performance_mode as mode
import pytest
import torch
from helpers import FEATURES, feature, gradients, random_qkv

from flash_attn import flash_attn_func, modes
from flash_attn.cli import devices, invariance

BITS_16 = pytest.mark.parametrize("dtype", mode.DTYPES, ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def _built():
    if not devices.build_info()["rtz"]:
        pytest.skip("built with FLASH_ATTENTION_INTERNAL_USE_RTZ=0")


@pytest.fixture
def run(monkeypatch):
    def call(performance, q, k, v, dout, **arguments):
        monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, str(int(performance)))
        inputs = tuple(x.detach().clone().requires_grad_() for x in (q, k, v))
        out, lse, _ = flash_attn_func(*inputs, **arguments, return_attn_probs=True)
        return mode.Results(out.detach(), lse.detach(), *gradients(out, inputs, dout))

    return call


def check(run, q, k, v, **arguments):
    dout = torch.randn(q.shape).to(q.dtype)
    mode.assert_accurate(run(True, q, k, v, dout, **arguments), q, k, v, dout, **arguments)


@BITS_16
@pytest.mark.parametrize("name", FEATURES)
def test_features(run, dtype, name):
    q, k, v = random_qkv("cpu", dtype, 2, 45, 83, heads_q=4, heads_kv=2, dim=64)
    check(run, q, k, v, **feature(name, q))


@BITS_16
@pytest.mark.parametrize("dim", [1, 7, 33, 64, 80, 128, 192, 256])
def test_head_dims(run, dtype, dim):
    q, k, v = random_qkv("cpu", dtype, 1, 70, 131, heads_q=2, heads_kv=1, dim=dim)
    check(run, q, k, v, causal=True)


@BITS_16
@pytest.mark.parametrize("lengths", [(1, 1), (1, 200), (33, 1), (129, 65), (64, 64), (70, 20), (0, 5), (5, 0)])
def test_lengths(run, dtype, lengths):
    q, k, v = random_qkv("cpu", dtype, 1, *lengths, heads_q=2, dim=64)
    check(run, q, k, v, causal=True)


@BITS_16
def test_strided_inputs(run, dtype):
    q, k, v = torch.randn(2, 50, 3, 2, 64).to(dtype).unbind(2)
    check(run, q, k, v)


@BITS_16
def test_dropout(monkeypatch, dtype):
    """The mask is that of the default mode."""
    q, k, v = random_qkv("cpu", dtype, 1, 90, 140, heads_q=2, dim=64, grad=True)
    dout = torch.randn(q.shape).to(dtype)
    found = []
    for performance in "01":
        monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, performance)
        torch.manual_seed(7)
        out, lse, s_dmask = flash_attn_func(q, k, v, dropout_p=0.25, return_attn_probs=True)
        found.append((mode.Results(out, lse, *gradients(out, (q, k, v), dout)), ~torch.signbit(s_dmask)))
    (_, keep), (results, same) = found
    assert torch.equal(keep, same)
    mode.assert_accurate(results, q, k, v, dout, keep, dropout_p=0.25)


def test_fp16_is_multiplied_in_bf16(run):
    mode.check_fp16_is_multiplied_in_bf16(run)


def test_inputs_are_rounded_to_nearest(run):
    mode.check_inputs_are_rounded_to_nearest(run)


def test_nans_stay(run):
    mode.check_nans_stay(run, signalling=True)


def test_large_gradients(run):
    mode.check_large_gradients(run)


@BITS_16
def test_p_is_truncated(run, dtype):
    mode.check_p_is_truncated(run, dtype)


@BITS_16
def test_p_and_ds_are_truncated_in_the_backward(run, dtype):
    mode.check_backward_is_truncated(run, dtype)


def test_small_gradients(run):
    """The host keeps fp16's denormals, with the few bits they have; bf16 has all of its eight there."""
    inputs = mode.small_gradients(-20)
    plain, found = (mode.relative_error(run(performance, *inputs).dq, *inputs) for performance in (False, True))
    assert found < 0.01 < 0.03 < plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_do_not_change(run, dtype):
    q, k, v = random_qkv("cpu", dtype, 1, 40, 50, heads_q=2, dim=64)
    dout = torch.randn(q.shape).to(dtype)
    plain, found = (run(performance, q, k, v, dout, causal=True) for performance in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(plain, found, strict=True))


def test_a_backward_has_the_mode_of_its_forward(monkeypatch):
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 70, 70, heads_q=2, dim=64, grad=True)
    dout = torch.randn(q.shape).to(q.dtype)
    found = {}
    for performance, later in ("00", "11", "10"):
        monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, performance)
        out = flash_attn_func(q, k, v)
        monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, later)
        found[performance + later] = gradients(out, (q, k, v), dout)
    assert all(torch.equal(x, y) for x, y in zip(found["11"], found["10"], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(found["11"], found["00"], strict=True))


@BITS_16
def test_guarantees(monkeypatch, dtype):
    """Runs, batches, packing, chunks and decoding give the same bits; other ones than in the default mode."""
    sizes = invariance.Sizes(seqlen=70, keys=300, blocks_of_split=1, repeats=2)
    digests = []
    for performance in "01":
        monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, performance)
        proofs = list(invariance.prove_all(dtype, torch.device("cpu"), sizes))
        assert all(proof.passed for proof in proofs)
        digests.append([proof.ways[0].digest for proof in proofs])
    assert not set(digests[0]) & set(digests[1])
