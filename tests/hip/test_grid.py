"""What the other files test at one head dimension, at the others: the long part of `make test-hip`."""

import pytest
import test_kernels
from emulator import DTYPES
from helpers import FEATURES, feature, longest, random_packed, random_qkv
from test_kernels import check
from test_performance_kernels import BITS_16, run  # noqa: F401
from test_performance_kernels import check as check_performance

pytestmark = pytest.mark.grid
FLOATS = pytest.mark.parametrize("dtype", list(DTYPES), ids=DTYPES.values())


@FLOATS
@pytest.mark.parametrize("dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("name", FEATURES)
def test_features(emulator, dtype, dim, name):
    """Two blocks of queries and several of keys, the last ones partly filled; grouped heads."""
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=139, seqlen_k=150, heads_q=2, heads_kv=1, dim=dim)
    check(emulator, q, k, v, **feature(name, q))


@BITS_16
@pytest.mark.parametrize("dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("name", FEATURES)
def test_features_in_the_performance_mode(run, dtype, dim, name):  # noqa: F811
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=70, seqlen_k=90, heads_q=2, heads_kv=1, dim=dim)
    check_performance(run, q, k, v, **feature(name, q))


@FLOATS
@pytest.mark.parametrize("dim", [32, 96, 128, 256])
@pytest.mark.parametrize("name", ["full", "window", "everything"])
def test_packed(emulator, dtype, dim, name):
    lengths_q, lengths_k = [5, 0, 130, 17], [40, 30, 131, 2]
    q, k, v, where = random_packed("cpu", dtype, lengths_q, lengths_k, dim=dim)
    check(emulator, q, k, v, longest(lengths_q, lengths_k), **feature(name, q, len(lengths_q)), **where)


@FLOATS
@pytest.mark.parametrize("dim", [32, 96, 256])
def test_dropout(emulator, dtype, dim):
    test_kernels.test_dropout(emulator, dtype, dim)


@FLOATS
@pytest.mark.parametrize("dim", [32, 96, 128, 192, 256])
def test_deterministic(emulator, dtype, dim):
    """Blocks that add to dQ in turns."""
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=70, seqlen_k=270, heads_q=2, heads_kv=1, dim=dim)
    check(emulator, q, k, v, deterministic=True, causal=True)
