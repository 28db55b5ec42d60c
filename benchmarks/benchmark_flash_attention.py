"""Forward and backward of this package against standard attention, with dropout and causal masks: time and memory.

    PYTHONPATH=. python benchmarks/benchmark_flash_attention.py --dropout 0.1 --causal

Standard attention forms the matrix of scores: matmul, mask, softmax, dropout, matmul, as written below. Timing is that
of `python -m flash_attn bench` (flash_attn/cli/measure.py); for the fused kernels that torch offers, use that command.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import flash_attn_func
from flash_attn.cli import devices
from flash_attn.cli.measure import Call, Contender, Measurement, measure
from flash_attn.cli.peers import DTYPES, prepare_backward, prepare_both, prepare_forward
from flash_attn.cli.terminal import Table

SEQLENS = {"cuda": [512, 1024, 2048, 4096], "cpu": [128, 256, 512, 1024]}
PASSES: dict[str, Callable[..., Call]] = {
    "forward": prepare_forward,
    "backward": prepare_backward,
    "both": prepare_both,
}


def standard_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool) -> Tensor:
    """q, k, v [batch, seq, heads, dim]: out likewise. Scores take batch * heads * seq^2 elements."""
    scores = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    if causal:
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), dropout_p)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def main() -> int:
    """Prints a row for each pass and length; with --json, writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    devices.add_device_argument(parser)
    parser.add_argument("--batch", type=int, help="default 8, on a CPU 1")
    parser.add_argument("--heads", type=int, help="default 16, on a CPU 4")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seqlen", type=int, nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16, on a CPU fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = devices.choose(options.device)
    is_gpu = device.type == "cuda"
    dtype = options.dtype or ("bf16" if is_gpu else "fp32")
    batch, heads = options.batch or (8 if is_gpu else 1), options.heads or (16 if is_gpu else 4)
    mask = "causal" if options.causal else "full"
    print(f"{device}: {devices.describe(device)}; torch {torch.__version__}")
    print(f"batch {batch}, heads {heads}, head_dim {options.head_dim}, {dtype}, {mask}, dropout {options.dropout}")

    table = Table(
        ("pass", "<8"),
        ("seq", ">6"),
        ("standard, ms", ">12"),
        ("flash_attn, ms", ">14"),
        ("speedup", ">8"),
        ("standard, MiB", ">13"),
        ("flash_attn, MiB", ">15"),
        ("memory", ">8"),
    )
    functions = {"standard": standard_attention, "flash_attn": flash_attn_func}
    rows = []
    for which, prepare in PASSES.items():
        for seqlen in options.seqlen or SEQLENS[device.type]:
            torch.manual_seed(0)
            size = (batch, seqlen, heads, options.head_dim)
            inputs = [torch.randn(size, device=device, dtype=DTYPES[dtype]) for _ in range(4)]
            settings = {"dropout_p": options.dropout, "causal": options.causal}
            contenders = [
                Contender(name, partial(prepare, partial(function, **settings), inputs))
                for name, function in functions.items()
            ]
            found, refused = measure(contenders, device, options.rounds)
            table.row(which, seqlen, *cells(found.get("standard"), found.get("flash_attn")))
            for name, reason in refused.items():
                print(f"    {name}: {reason}")
            rows += [
                {"pass": which, "seqlen": seqlen, "contender": name, "seconds": m.seconds, "peak_bytes": m.peak_bytes}
                for name, m in found.items()
            ]
    if options.json is not None:
        settings = {"batch": batch, "heads": heads, "head_dim": options.head_dim, "dtype": dtype}
        settings |= {"causal": options.causal, "dropout": options.dropout}
        options.json.write_text(json.dumps({"machine": devices.machine(), **settings, "rows": rows}, indent=1) + "\n")
    return 0


def cells(standard: Measurement | None, ours: Measurement | None) -> list[str]:
    """Times, their ratio, memories, their ratio; "-" for what could not be measured."""

    def text(measurement: Measurement | None, value: str) -> str:
        if measurement is None:
            return "-"
        if value == "seconds":
            return f"{measurement.seconds * 1e3:.3g}"
        return "-" if measurement.peak_bytes is None else f"{measurement.peak_bytes / 2**20:.1f}"

    speedup = memory = "-"
    if standard is not None and ours is not None:
        speedup = f"{standard.seconds / ours.seconds:.2f}x"
        if standard.peak_bytes and ours.peak_bytes:
            memory = f"{standard.peak_bytes / ours.peak_bytes:.1f}x"
    times = [text(standard, "seconds"), text(ours, "seconds"), speedup]
    return [*times, text(standard, "bytes"), text(ours, "bytes"), memory]


if __name__ == "__main__":
    sys.exit(main())
