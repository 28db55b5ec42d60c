"""Fixtures. Every test that takes `device` runs on each backend that is built and present."""

import pytest
import torch
from helpers import DEVICES, FLOAT_DTYPES

from flash_attn import modes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` runs over the backends, `dtype` over the float types that kernels exist for there."""
    names = metafunc.fixturenames
    if "device" in names and "dtype" in names:
        pairs = [(device, dtype) for device in DEVICES for dtype in FLOAT_DTYPES[device]]
        ids = [f"{device}-{str(dtype).removeprefix('torch.')}" for device, dtype in pairs]
        metafunc.parametrize(("device", "dtype"), pairs, ids=ids)
    elif "device" in names:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _same_start():
    """A fixed seed, and the modes as they are by default."""
    torch.manual_seed(0)
    modes.set_deterministic_mode(False)
    yield
    modes.set_deterministic_mode(False)


@pytest.fixture
def cuda_only():
    """Skips where there is no GPU with kernels built for it."""
    if "cuda" not in DEVICES:
        pytest.skip("no GPU, or no kernels built for one")
    return "cuda"
