"""torch's backends of `scaled_dot_product_attention`, and the calls that a benchmark times."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn.cli.measure import Call

OURS = "flash_attn"
PEERS: dict[str, dict[str, SDPBackend | None]] = {
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
    "cpu": {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def chosen(asked: Sequence[str] | None, device: torch.device) -> list[str]:
    """The peers to measure: those asked for, or all.

    Raises:
        SystemExit: there is no such peer for the device.
    """
    known = list(PEERS[device.type])
    for name in asked or ():
        if name not in known:
            raise SystemExit(f"--peers: on {device.type} they are {', '.join(known)}, got {name}")
    return known if asked is None else list(asked)


@contextmanager
def sdpa_context(backend: SDPBackend | None, deterministic: bool = False) -> Iterator[None]:
    """Inside it torch's function is the one peer; with torch's deterministic switch on where that is wanted."""
    settings: Any = torch.utils.deterministic
    choice: AbstractContextManager = nullcontext() if backend is None else sdpa_kernel(backend)
    switch, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    with choice:
        try:
            torch.use_deterministic_algorithms(switch or deterministic)
            settings.fill_uninitialized_memory = False  # it would charge peers for filling buffers
            yield
        finally:
            torch.use_deterministic_algorithms(switch)
            settings.fill_uninitialized_memory = fill


def prepare_forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """A forward that records nothing for a backward; inputs are q, k, v, dout."""
    return partial(function, *inputs[:3])


def prepare_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """The backward of an output computed here."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return partial(torch.autograd.grad, function(*leaves), leaves, inputs[3], retain_graph=True)


def prepare_both(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """A forward and its backward."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(function(*leaves), leaves, inputs[3])
