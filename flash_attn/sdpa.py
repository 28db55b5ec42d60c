"""This package as the flash backend of torch.nn.functional.scaled_dot_product_attention, on GPUs.

Nothing happens on import. `register()` makes the name known to torch, and torch switches to it and back:

    flash_attn.sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("flash_attn")
    ...
    torch.nn.attention.restore_flash_attention_impl()

Needs a torch with `torch.nn.attention.register_flash_attention_impl` (2.11 or later). Tensors are
[batch, heads, seq, dim] in this file, as torch's function has them.
"""

import torch
from torch import Tensor

from flash_attn import _library, _ops
from flash_attn import _prepare as prepare


class _Handle:
    """Keeps the overrides alive until torch removes them."""

    def __init__(self, library: torch.library.Library):
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """Gives the operators back to torch's own kernels."""
        self._library = None


def register(name: str = "flash_attn") -> None:
    """Makes this package known to torch as a flash implementation called `name`; activates nothing.

    Raises:
        RuntimeError: this torch has no registry, or the compiled library is missing.
    """
    _library.require()
    registry = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if registry is None:
        raise RuntimeError(
            f"torch: needs torch.nn.attention.register_flash_attention_impl, got torch {torch.__version__} without it "
            "(install torch 2.11 or later, or call flash_attn_func itself)"
        )
    registry(name, register_fn=_override)


def _override() -> _Handle:
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("_scaled_dot_product_flash_attention", sdpa_forward, "CUDA")
    library.impl("_scaled_dot_product_flash_attention_backward", sdpa_backward, "CUDA")
    return _Handle(library)


def _options(q: Tensor, k: Tensor, dropout_p: float, is_causal: bool, scale: float | None, **rest) -> _ops.Options:
    return prepare.options(
        q, q.shape[1], k.shape[1], dropout_p=dropout_p, causal=is_causal, softmax_scale=scale, **rest
    )


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention. torch aligns causal masks to the top left, and calls this only for
    equal lengths, where both alignments agree."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = _options(q, k, dropout_p, is_causal, scale, return_attn_probs=return_debug_mask)
    tensors = prepare.tensors(q, q.shape[0], options.dropout_p)
    out, lse, s_dmask = _ops.forward(q, k, v, tensors, options)
    out = out.transpose(1, 2)
    wanted = torch.empty_like(query)  # the layout that torch's fake kernel promises
    if wanted.stride() != out.stride():
        out = wanted.copy_(out)
    rng_state = tensors.rng_state
    if rng_state is None:
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    return out, lse, None, None, q.shape[1], k.shape[1], rng_state.view(torch.uint64), unused, s_dmask


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_backward; deterministic where torch's own switch says so too."""
    q, k, v = (_ops.innermost_contiguous(x.transpose(1, 2)) for x in (query, key, value))
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = _options(q, k, dropout_p, is_causal, scale, deterministic=deterministic)
    tensors = _ops.Tensors(rng_state=philox_seed.view(torch.int64) if options.dropout_p > 0.0 else None)
    gradients = (_ops.empty_gradient(q), _ops.empty_gradient(k), _ops.empty_gradient(v))
    dout, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    _ops.backward(dout, None, q, k, v, out, logsumexp, gradients, tensors, options)
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, dk, dv
