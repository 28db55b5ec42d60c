"""Cross entropy with label smoothing, logit scale and z-loss, under flash-attn's name and signature, in plain torch."""

import torch
from torch import Tensor

from flash_attn import _checks as check


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and one LSE for each row, not the probabilities, for the backward."""

    @staticmethod
    def forward(ctx, logits, labels, lse, smoothing, logit_scale, lse_square_scale, ignore_index, inplace_backward):
        scaled = logits.float() * logit_scale
        if lse is None:
            lse = torch.logsumexp(scaled, dim=-1)
        counted = labels != ignore_index
        target = scaled.gather(1, labels.masked_fill(~counted, 0)[:, None]).squeeze(1)
        losses = lse - (1.0 - smoothing) * target
        if smoothing > 0.0:
            losses = losses - smoothing * scaled.mean(dim=-1)
        z_losses = (lse_square_scale * lse.square()).masked_fill(~counted, 0.0)
        losses = losses.masked_fill(~counted, 0.0) + z_losses
        ctx.save_for_backward(logits, labels, lse)
        ctx.settings = smoothing, logit_scale, lse_square_scale, ignore_index, inplace_backward
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses, _):
        logits, labels, lse = ctx.saved_tensors
        smoothing, logit_scale, lse_square_scale, ignore_index, inplace_backward = ctx.settings
        counted = labels != ignore_index
        # d(lse)/d(logit) is the probability; the z-loss adds 2 * scale * lse times that.
        gradient = torch.exp(logits.float() * logit_scale - lse[:, None])
        gradient *= (1.0 + 2.0 * lse_square_scale * lse)[:, None]
        gradient -= smoothing / logits.shape[1]
        index = labels.masked_fill(~counted, 0)[:, None]
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, smoothing - 1.0))
        gradient *= (dlosses * logit_scale).masked_fill(~counted, 0.0)[:, None]
        gradient = logits.copy_(gradient) if inplace_backward else gradient.to(logits.dtype)
        return gradient, *(None for _ in range(7))


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, and the part of it that is z-loss.

    Args:
        logits: [rows, classes], any float dtype; sums are in float32.
        labels: int64 [rows]; rows labelled ignore_index have loss 0 and no gradient.
        precomputed_lse: float32 [rows], the log-sum-exp of the scaled logits.
        label_smoothing: share of the target spread evenly over the classes.
        logit_scale: the logits are multiplied by it first.
        lse_square_scale: adds this times lse^2 to the loss (z-loss, PaLM, arXiv 2204.02311).
        inplace_backward: write the gradient over the logits.
        process_group: must be None; a vocabulary split over processes is not supported.

    Returns:
        losses and z_losses, float32 [rows]. No gradient flows through z_losses alone.
    """
    if process_group is not None:
        check.fail("process_group", "must be None", type(process_group).__name__, "gather the logits first")
    check.tensor("logits", logits, ("rows", "classes"))
    check.tensor("labels", labels, ("rows",))
    if labels.shape[0] != logits.shape[0]:
        check.fail("labels", f"must have the {logits.shape[0]} rows of logits", labels.shape[0], "match them")
    return _CrossEntropy.apply(
        logits,
        labels.long(),
        precomputed_lse,
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        inplace_backward,
    )
