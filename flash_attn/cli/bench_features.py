"""Two tables beside `bench`'s grid: what features keep of the plain kernels' speed, and decoding.

A feature is measured in the same rounds as plain attention over as many tokens, and compared per visited block: `of
plain` is 1 where it takes the time that plain attention takes for the blocks of queries and keys in which the feature
leaves anything visible. Decoding, one query a sequence against a cache, is bound by memory; its figure is the rate at
which K and V are read.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.cli.measure import Call, Clock, Contender, measure
from flash_attn.cli.peers import DTYPES, OURS, PEERS, prepare_backward, prepare_forward, sdpa_context
from flash_attn.cli.terminal import Table, title
from flash_attn.modes import deterministic_mode

BLOCK = 128  # queries and keys: the unit in which visited blocks are counted
RAGGED = (0.02, 0.29, 0.07, 0.18, 0.005, 0.24, 0.11, 0.085)  # shares of a packed batch's tokens
NOTHING: Mapping[str, Any] = MappingProxyType({})

Row = dict[str, Any]


class Cache(NamedTuple):
    """A decoding problem."""

    batch: int
    heads_q: int
    heads_kv: int
    keys: int


class Sizes(NamedTuple):
    """What is measured where the command line says nothing else."""

    seqlen: int
    tokens: int
    hidden: int
    window: int
    splits: tuple[int, ...]
    cache_dim: int
    caches: tuple[Cache, ...]


SIZES = {
    "cuda": Sizes(
        seqlen=8192,
        tokens=16384,
        hidden=2048,
        window=1024,
        splits=(2048, 512),
        cache_dim=128,
        caches=(
            Cache(1, 32, 8, 8192),
            Cache(1, 32, 8, 65536),
            Cache(8, 32, 8, 8192),
            Cache(32, 32, 8, 8192),
            Cache(8, 32, 32, 4096),
            Cache(64, 64, 8, 4096),
        ),
    ),
    "cpu": Sizes(
        seqlen=1024,
        tokens=1024,
        hidden=512,
        window=256,
        splits=(512,),
        cache_dim=64,
        caches=(Cache(1, 8, 2, 4096), Cache(4, 8, 8, 1024)),
    ),
}


class Feature(NamedTuple):
    """A way to call attention."""

    name: str
    arguments: Mapping[str, Any] = NOTHING
    group: int = 1  # query heads of a KV head
    split_size: int | None = None
    lengths: tuple[int, ...] = ()  # of the sequences of a packed batch

    def visited_blocks(self, batch: int, seqlen: int) -> int:
        """Of one head."""
        mask = {name: self.arguments[name] for name in ("causal", "window_size") if name in self.arguments}
        return sum(visited_blocks(length, **mask) for length in self.lengths or [seqlen] * batch)

    def function(self, device: torch.device) -> Callable[..., Tensor]:
        """Of q, k, v."""
        if not self.lengths:
            return partial(flash_attn_func, **self.arguments)
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)
        return partial(
            flash_attn_varlen_func,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=max(self.lengths),
            max_seqlen_k=max(self.lengths),
            **self.arguments,
        )


def features(sizes: Sizes) -> Iterator[Feature]:
    """The rows of the table. The first is what the others are compared with."""
    yield Feature("plain")
    yield Feature("causal", {"causal": True})
    yield Feature(f"window {sizes.window}", {"causal": True, "window_size": (sizes.window - 1, 0)})
    yield Feature("4 heads a KV head", group=4)
    yield Feature("8 heads a KV head", group=8)
    lengths = [int(share * sizes.tokens) for share in RAGGED]
    yield Feature("packed, ragged", lengths=(sizes.tokens - sum(lengths[1:]), *lengths[1:]))
    short = [sizes.tokens // 128] * 96
    yield Feature("packed, one long", lengths=(sizes.tokens - sum(short), *short))
    yield Feature("softcap 30", {"softcap": 30.0})
    yield from (Feature(f"split_size {size}", split_size=size) for size in sizes.splits)


def visited_blocks(length: int, causal: bool = False, window_size: tuple[int, int] = (-1, -1)) -> int:
    """Blocks of BLOCK queries and BLOCK keys in which something is visible, in a sequence of `length` of both."""
    left, right = window_size[0], 0 if causal else window_size[1]
    visited = 0
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length) - 1
        begin = 0 if left < 0 else max(0, first - left)
        end = length if right < 0 else min(length, last + right + 1)
        visited += max(0, -(-end // BLOCK) - begin // BLOCK)
    return visited


def folded_in(split_size: int | None) -> AbstractContextManager:
    """Inside it keys are folded in chunks of that size; None: as they come."""
    return nullcontext() if split_size is None else deterministic_mode(True, split_size=split_size)


# ---- features --------------------------------------------------------------------------------------------------------


def measure_features(options: argparse.Namespace, device: torch.device, clock: Clock) -> list[Row]:
    """Measures and prints; returns the rows for JSON. Of --seqlen it takes the longest."""
    sizes = SIZES[device.type]
    seqlen = max(options.seqlen or [sizes.seqlen])
    tokens, hidden = max(seqlen, options.tokens or sizes.tokens), options.hidden or sizes.hidden
    sizes = sizes._replace(seqlen=seqlen, tokens=tokens, hidden=hidden)
    rows: list[Row] = []
    table = feature_table()
    for which in options.passes:
        for dtype in options.dtype or ("bf16",):
            for head_dim in options.head_dim if which != "deterministic" else ():
                found = measure_all_features(which, dtype, head_dim, sizes, device, options.rounds, clock)
                show_features(table, found)
                rows += found
    return rows


def measure_all_features(
    which: str, dtype: str, head_dim: int, sizes: Sizes, device: torch.device, rounds: int | None, clock: Clock
) -> list[Row]:
    """Those of one pass, dtype and head dimension, in the same rounds."""
    wanted = [one for one in features(sizes) if which == "forward" or one.split_size is None]
    contenders = [
        Contender(
            one.name,
            partial(prepare, one, which, head_dim, DTYPES[dtype], sizes, device),
            partial(folded_in, one.split_size),
        )
        for one in wanted
    ]
    found, refused = measure(contenders, device, rounds, clock)
    if refused:
        raise SystemExit(f"{OURS} cannot run {refused}")
    batch = sizes.tokens // sizes.seqlen
    blocks = {one.name: one.visited_blocks(batch, sizes.seqlen) for one in wanted}
    plain = wanted[0].name
    return [
        {
            "which": which,
            "dtype": dtype,
            "head_dim": head_dim,
            "seqlen": sizes.seqlen,
            "batch": batch,
            "feature": name,
            "seconds": one.seconds,
            "of_plain": found[plain].seconds / blocks[plain] * blocks[name] / one.seconds,
            "peak_bytes": one.peak_bytes,
        }
        for name, one in found.items()
    ]


def prepare(
    feature: Feature, which: str, head_dim: int, dtype: torch.dtype, sizes: Sizes, device: torch.device
) -> Call:
    """The call that is measured."""
    heads = max(8, sizes.hidden // head_dim)
    rows = (sum(feature.lengths),) if feature.lengths else (sizes.tokens // sizes.seqlen, sizes.seqlen)
    torch.manual_seed(0)
    inputs = [
        torch.randn(*rows, count, head_dim, device=device, dtype=dtype)
        for count in (heads, heads // feature.group, heads // feature.group, heads)
    ]
    return (prepare_forward if which == "forward" else prepare_backward)(feature.function(device), inputs)


def feature_table() -> Table:
    """Prints the heading."""
    title("Features: time, speed per visited block relative to plain attention, peak memory above the inputs")
    columns = (("pass", "<8"), ("dtype", "<5"), ("d", ">3"), ("seq", ">5"), ("feature", "<17"))
    return Table(*columns, ("ms", ">7"), ("of plain", ">8"), ("MiB", ">7"))


def show_features(table: Table, rows: Sequence[Row]) -> None:
    """A line each."""
    for row in rows:
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        key = (row[name] for name in ("which", "dtype", "head_dim", "seqlen", "feature"))
        table.row(*key, f"{row['seconds'] * 1e3:.3g}", f"{row['of_plain']:.2f}", memory)


# ---- decoding --------------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """How this package decodes."""

    deterministic: bool = False
    split_size: int | None = None
    page_size: int | None = None  # of a cache in pages, in random order
    appends: bool = False  # the last key, which is rotated as the query is


# Keys split as fills the machine, from pages likewise, with what a model's step does beside, never split, split at
# fixed places.
DECODERS = {
    OURS: Decoder(),
    "pages of 16": Decoder(page_size=16),
    "appending": Decoder(appends=True),
    "deterministic": Decoder(deterministic=True),
    "split_size 2048": Decoder(deterministic=True, split_size=2048),
}


def measure_decoding(
    options: argparse.Namespace, peers: Sequence[str], device: torch.device, clock: Clock
) -> list[Row]:
    """Measures and prints; returns the rows for JSON."""
    sizes = SIZES[device.type]
    table = decoding_table(peers)
    rows: list[Row] = []
    for dtype in options.dtype or ("bf16",):
        for cache in sizes.caches:
            contenders = [
                Contender(name, partial(prepare_decoding, name, cache, sizes, DTYPES[dtype], device), context)
                for name, context in decoders(peers, device).items()
            ]
            found, refused = measure(contenders, device, options.rounds, clock)
            if OURS in refused:
                raise SystemExit(f"{OURS} cannot run {cache}: {refused[OURS]}")
            read = 2 * cache.batch * cache.keys * cache.heads_kv * sizes.cache_dim * DTYPES[dtype].itemsize
            rows += [
                {
                    "dtype": dtype,
                    "head_dim": sizes.cache_dim,
                    **cache._asdict(),
                    "contender": name,
                    "seconds": one.seconds,
                    "bytes_per_second": read / one.seconds,
                }
                for name, one in found.items()
            ]
            show_decoding(table, peers, rows[-len(found) :])
    return rows


def decoders(peers: Sequence[str], device: torch.device) -> dict[str, Callable[[], AbstractContextManager]]:
    """Contenders, and what they are called in."""
    found: dict[str, Callable[[], AbstractContextManager]] = {
        name: partial(folded_in, decoder.split_size) for name, decoder in DECODERS.items()
    }
    return found | {name: partial(sdpa_context, PEERS[device.type][name]) for name in peers}


def prepare_decoding(name: str, cache: Cache, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Call:
    """One query a sequence against all keys."""
    torch.manual_seed(0)
    new = partial(torch.randn, device=device, dtype=dtype)
    q = new(cache.batch, 1, cache.heads_q, sizes.cache_dim)
    k, v = (new(cache.batch, cache.keys, cache.heads_kv, sizes.cache_dim) for _ in range(2))
    if name in DECODERS:
        decoder = DECODERS[name]
        if decoder.appends:
            key, value = (new(cache.batch, 1, cache.heads_kv, sizes.cache_dim) for _ in range(2))
            cos, sin = (new(cache.keys, sizes.cache_dim // 2) for _ in range(2))
            before = torch.full((cache.batch,), cache.keys - 1, dtype=torch.int32, device=device)
            settings: dict[str, Any] = {"rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": before, "causal": True}
            return partial(flash_attn_with_kvcache, q, k, v, key, value, **settings)
        if decoder.page_size is None:
            return partial(flash_attn_func, q, k, v, deterministic=decoder.deterministic)
        k, v = (x.view(-1, decoder.page_size, cache.heads_kv, sizes.cache_dim) for x in (k, v))
        table = torch.randperm(k.shape[0], dtype=torch.int32, device=device).view(cache.batch, -1)
        return partial(flash_attn_with_kvcache, q, k, v, block_table=table)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=cache.heads_q != cache.heads_kv)


def grouped(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The contenders of each cache together."""
    for _, group in itertools.groupby(rows, key=decoding_key):
        yield list(group)


def decoding_key(row: Row) -> tuple:
    """The first columns."""
    return row["dtype"], row["head_dim"], row["batch"], f"{row['heads_q']}/{row['heads_kv']}", row["keys"]


def decoding_table(peers: Sequence[str]) -> Table:
    """Prints the heading."""
    title("Decoding: GB/s of K and V")
    columns = (("dtype", "<5"), ("d", ">3"), ("batch", ">5"), ("heads", "<5"), ("keys", ">6"))
    return Table(*columns, *((name, ">10") for name in (*DECODERS, *peers)))


def show_decoding(table: Table, peers: Sequence[str], rows: Sequence[Row]) -> None:
    """One line: the contenders of one cache."""
    speeds = {row["contender"]: row["bytes_per_second"] / 1e9 for row in rows}
    shown = {name: f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}" for name, speed in speeds.items()}
    table.row(*decoding_key(rows[0]), *(shown.get(name, "-") for name in (*DECODERS, *peers)))
