"""Speed and peak memory against every peer that the installed torch offers, side by side in one process.

Peers are the backends of torch's `scaled_dot_product_attention`. All of them read the same numbers: fused ones through
transposed views of [batch, seq, heads, dim], the unfused `math` from contiguous [batch, heads, seq, dim], which suits
it better. A backward is `torch.autograd.grad` on an output computed once, for everyone, this package's Python included;
peers' deterministic backward is what `torch.use_deterministic_algorithms(True)` gives.

TFLOP/s count 4 * batch * heads * seq^2 * head_dim, halved for causal, times 2.5 for a backward.
"""

import argparse
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from flash_attn import flash_attn_func
from flash_attn.cli import bench_features, devices, plot
from flash_attn.cli.measure import ROUNDS, Call, Clock, Contender, Measurement, measure
from flash_attn.cli.peers import DTYPES, OURS, PEERS, chosen, prepare_backward, prepare_forward, sdpa_context
from flash_attn.cli.terminal import Table, title

PASSES = ("forward", "backward", "deterministic")  # the last: a deterministic backward
TABLES = ("grid", "features", "decoding")
SCHEMA = 1  # of the JSON file
NO_TABLES: dict[str, Any] = {"features": (), "decoding": ()}  # what a file may lack


class Grid(NamedTuple):
    """What is measured by default: tokens in all = batch * seq, hidden = heads * head_dim."""

    tokens: int
    hidden: int
    seqlens: tuple[int, ...]
    dtypes: tuple[str, ...]


GRIDS = {
    "cuda": Grid(16384, 2048, (512, 1024, 2048, 4096, 8192, 16384), ("bf16",)),
    "cpu": Grid(2048, 256, (512, 1024, 2048), ("fp32", "bf16")),
}


class Shape(NamedTuple):
    """One row of the grid."""

    which: str  # of PASSES
    dtype: str  # of DTYPES
    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int

    @property
    def flops(self) -> float:
        """Useful floating-point operations of one call."""
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim * (0.5 if self.causal else 1.0)
        return forward if self.which == "forward" else 2.5 * forward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, and where the results go."""
    devices.add_device_argument(parser)
    tables = "grid: passes, dims, masks, lengths; features: what they keep of plain attention's speed; decoding: GB/s"
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES[:1], help=f"{tables} (default: grid)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="deterministic: that backward")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--causal", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--seqlen", nargs="+", type=int, help="default: 512 to 16384, on a CPU 512 to 2048")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16, on a CPU fp32 and bf16")
    parser.add_argument("--tokens", type=int, help="batch * seqlen; default 16384, on a CPU 2048")
    parser.add_argument("--hidden", type=int, help="heads * head_dim; default 2048, on a CPU 256")
    parser.add_argument("--peers", nargs="*", help="default: all that run here")
    parser.add_argument("--rounds", type=int, help=f"medians are over these; default {ROUNDS['cuda']}, on a CPU 5")
    parser.add_argument(
        "--cpu-time", action="store_true", help="on a busy machine: one thread of the CPU, its own time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results, machine and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results (needs matplotlib)")
    parser.add_argument("--load", type=Path, metavar="FILE", help="show and draw the results of an earlier --json")


def run(options: argparse.Namespace) -> int:
    """Measures or loads, prints tables, writes files."""
    if options.plot is not None:
        plot.require()
    if options.load is not None:
        try:
            results = {**NO_TABLES, **json.loads(options.load.read_text())}
        except (OSError, ValueError) as error:
            raise SystemExit(f"--load: {options.load} cannot be read ({error})") from None
        show(results)
    else:
        results = measure_tables(options, devices.choose(options.device))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {options.json}")
    if options.plot is not None and results["rows"]:
        plot.draw(results, options.plot)
        print(f"\nwritten: {options.plot}")
    return 0


# ---- what is measured ------------------------------------------------------------------------------------------------


def shapes(options: argparse.Namespace, device: torch.device) -> Iterator[Shape]:
    """The rows of the grid, in the order of the tables."""
    grid = GRIDS[device.type]
    hidden, tokens = options.hidden or grid.hidden, options.tokens or grid.tokens
    axes = (options.passes, options.dtype or grid.dtypes, options.head_dim, options.causal)
    for which, dtype, head_dim, causal in itertools.product(*axes):
        for seqlen in options.seqlen or grid.seqlens:
            sizes = max(1, tokens // seqlen), max(1, hidden // head_dim)
            yield Shape(which, dtype, head_dim, causal == "yes", seqlen, *sizes)


def contenders(shape: Shape, device: torch.device, peers: Sequence[str]) -> list[Contender]:
    """This package and the peers, on the same numbers."""
    torch.manual_seed(0)
    size = (shape.batch, shape.seqlen, shape.heads, shape.head_dim)
    inputs = [torch.randn(size, device=device, dtype=DTYPES[shape.dtype]) for _ in range(4)]  # q, k, v, dout
    found = [Contender(OURS, partial(prepare, ours(shape), shape, inputs))]
    for name in peers:
        backend = PEERS[device.type][name]
        views = [x.transpose(1, 2) for x in inputs]
        if backend == SDPBackend.MATH:
            views = [x.contiguous() for x in views]
        function = partial(F.scaled_dot_product_attention, is_causal=shape.causal)
        found.append(
            Contender(
                name,
                partial(prepare, function, shape, views),
                partial(sdpa_context, backend, shape.which == "deterministic"),
            )
        )
    return found


def ours(shape: Shape) -> Callable[..., Tensor]:
    """flash_attn_func with the row's settings."""
    return partial(flash_attn_func, causal=shape.causal, deterministic=shape.which == "deterministic")


def prepare(function: Callable[..., Tensor], shape: Shape, inputs: Sequence[Tensor]) -> Call:
    """The call that the row measures."""
    return (prepare_forward if shape.which == "forward" else prepare_backward)(function, inputs)


def measure_tables(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures and prints; returns what --json writes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses matmuls in deterministic rows
    clock = time.perf_counter
    if options.cpu_time:
        if device.type != "cpu":
            raise SystemExit(f"--cpu-time: needs --device cpu, got {device}")
        torch.set_num_threads(1)
        clock = time.process_time
    peers = chosen(options.peers, device)
    print(f"{device}: {devices.describe(device)}; torch {torch.__version__}")
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": devices.describe(device),
        "machine": devices.machine(),
        "rounds": options.rounds or ROUNDS[device.type],
        "clock": "CPU time of one thread" if options.cpu_time else "elapsed time",
        "peers": peers,
        "rows": [],
        "refused": [],
        **NO_TABLES,
    }
    if "grid" in options.tables:
        results["rows"], results["refused"] = measure_grid(options, peers, device, clock)
        show_memory(results)
    if "features" in options.tables:
        results["features"] = bench_features.measure_features(options, device, clock)
    if "decoding" in options.tables:
        results["decoding"] = bench_features.measure_decoding(options, peers, device, clock)
    return results


def measure_grid(
    options: argparse.Namespace, peers: Sequence[str], device: torch.device, clock: Clock
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures row by row and prints each as it is done; returns the rows, and who could not do what, and why."""
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    table = speed_table(peers)
    for shape in shapes(options, device):
        found, reasons = measure(contenders(shape, device, peers), device, options.rounds, clock)
        if OURS in reasons:
            raise SystemExit(f"{OURS} cannot run {shape}: {reasons[OURS]}")
        rows += [record(shape, name, measurement) for name, measurement in found.items()]
        refused += [{**shape._asdict(), "contender": name, "reason": reason} for name, reason in reasons.items()]
        show_speed(table, peers, rows[-len(found) :])
    for name, reason in dict.fromkeys((row["contender"], row["reason"]) for row in refused):
        print(f"{name} (-): {reason}")
    return rows, refused


def record(shape: Shape, name: str, measurement: Measurement) -> dict[str, Any]:
    """One contender in one row of the grid, for JSON."""
    return {
        **shape._asdict(),
        "contender": name,
        "seconds": measurement.seconds,
        "seconds_of_rounds": measurement.rounds,
        "tflops": shape.flops / measurement.seconds / 1e12,
        "peak_bytes": measurement.peak_bytes,
    }


# ---- tables ----------------------------------------------------------------------------------------------------------

KEY = (("pass", "<13"), ("dtype", "<5"), ("d", ">3"), ("causal", "<6"), ("seq", ">5"), ("batch", ">5"))


def key_cells(row: dict[str, Any]) -> tuple:
    """The columns of KEY."""
    causal = "yes" if row["causal"] else "no"
    return row["which"], row["dtype"], row["head_dim"], causal, row["seqlen"], row["batch"]


def speed_table(peers: Sequence[str]) -> Table:
    """Prints the heading."""
    title("TFLOP/s, and in brackets how many times as fast flash_attn is")
    return Table(*KEY, (OURS, ">10"), *((name, ">15") for name in peers))


def show_speed(table: Table, peers: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """One line: the contenders of one row of the grid."""
    by_name = {row["contender"]: row for row in rows}
    mine = by_name[OURS]["tflops"]
    cells = [
        f"{by_name[name]['tflops']:.3g} ({mine / by_name[name]['tflops']:.2f}x)" if name in by_name else "-"
        for name in peers
    ]
    table.row(*key_cells(rows[0]), f"{mine:.3g}", *cells)


def grouped(results: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The contenders of each row of the grid together."""
    for _, rows in itertools.groupby(results["rows"], key=key_cells):
        yield list(rows)


def show(results: dict[str, Any]) -> None:
    """The tables of results that were loaded."""
    peers = results["peers"]
    print(f"{results['device']}; torch {results['machine']['torch']}; measured {results['date']}")
    if results["rows"]:
        table = speed_table(peers)
        for rows in grouped(results):
            show_speed(table, peers, rows)
        show_memory(results)
    if results["features"]:
        bench_features.show_features(bench_features.feature_table(), results["features"])
    if results["decoding"]:
        table = bench_features.decoding_table(peers)
        for caches in bench_features.grouped(results["decoding"]):
            bench_features.show_decoding(table, peers, caches)


def show_memory(results: dict[str, Any]) -> None:
    """Peak memory of every row of the grid."""
    title("Peak memory of a call above its inputs, MiB")
    table = Table(*KEY, (OURS, ">10"), *((name, ">10") for name in results["peers"]))
    for rows in grouped(results):
        by_name = {row["contender"]: row["peak_bytes"] for row in rows}
        peaks = [by_name.get(name) for name in (OURS, *results["peers"])]
        table.row(*key_cells(rows[0]), *("-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks))
