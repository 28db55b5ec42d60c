"""The guarantees, proven with bits: the same problem computed in different ways, and the SHA-256 of each result."""

import ctypes
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import deterministic_mode, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, modes
from flash_attn.cli.devices import dtype_name

PAGE_SIZE = 16  # keys


class Way(NamedTuple):
    """One way to compute the problem, and the digest of what it gave."""

    name: str
    digest: str


class Proof(NamedTuple):
    """One guarantee: it holds where all ways gave the same bits."""

    guarantee: str
    problem: str
    ways: list[Way]

    @property
    def passed(self) -> bool:
        return len({way.digest for way in self.ways}) == 1


class Sizes(NamedTuple):
    """How large the problems are."""

    seqlen: int = 300
    keys: int = 4096  # of the decoding problem
    blocks_of_split: int = 2  # split_size in key blocks
    repeats: int = 20


QUICK = Sizes(seqlen=150, keys=1024, blocks_of_split=1, repeats=5)
HEADS_Q, HEADS_KV, DIM = 4, 2, 64

# out, lse, and where there is a backward dq, dk, dv; batch first.
Result = tuple[Tensor, ...]


def digest(*tensors: Tensor) -> str:
    """SHA-256 over the tensors' bytes, one after the other."""
    sha = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        sha.update(ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()))
    return sha.hexdigest()


def prove_all(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Iterator[Proof]:
    """Every guarantee on one device and dtype, each proof as soon as it is there."""
    yield prove_run_to_run(dtype, device, sizes)
    yield prove_batch_invariant(dtype, device, sizes)
    yield prove_decoding_batch_invariant(dtype, device, sizes)
    yield prove_packing(dtype, device, sizes)
    yield prove_schedule_invariant(dtype, device, sizes)


def draw(dtype: torch.dtype, device: torch.device, batch: int, seqlen_q: int, seqlen_k: int) -> list[Tensor]:
    """q, k, v, dout, unit-normal, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, seqlen_q, HEADS_Q, DIM), *[(batch, seqlen_k, HEADS_KV, DIM)] * 2, (batch, seqlen_q, HEADS_Q, DIM)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def differentiate(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Result:
    """(out, lse, dq, dk, dv) of causal attention, with deterministic=True."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, deterministic=True, return_attn_probs=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Result:
    """(out, lse) of causal attention in the mode that is set."""
    with torch.no_grad():
        return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2]


def in_batches(size: int, function, *inputs: Tensor) -> Result:
    """The function applied to `size` sequences at a time, results put together again."""
    parts = [function(*(x[at : at + size] for x in inputs)) for at in range(0, inputs[0].shape[0], size)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def prove_run_to_run(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Proof:
    """Forward and backward, again and again."""
    inputs = draw(dtype, device, 2, sizes.seqlen, sizes.seqlen)
    ways = [Way("first run", digest(*differentiate(*inputs)))]
    later = {digest(*differentiate(*inputs)) for _ in range(sizes.repeats)}
    ways += [Way(f"{sizes.repeats} more runs", value) for value in sorted(later)]
    return Proof("run_to_run", f"{dtype_name(dtype)}, forward and backward", ways)


def prove_batch_invariant(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Proof:
    """Forward and backward of eight sequences, of four and four, of one at a time; of other numbers of heads."""
    inputs = draw(dtype, device, 8, sizes.seqlen, sizes.seqlen)
    whole = in_batches(8, differentiate, *inputs)
    ways = [Way("batch of 8", digest(*whole))]
    ways += [
        Way(name, digest(*in_batches(size, differentiate, *inputs))) for name, size in (("4 + 4", 4), ("8 x 1", 1))
    ]
    group = HEADS_Q // HEADS_KV
    heads = [
        differentiate(*(x[:, :, at : at + size] for x, (at, size) in zip(inputs, spans, strict=True)))
        for spans in (((group * h, group), (h, 1), (h, 1), (group * h, group)) for h in range(HEADS_KV))
    ]
    # lse is [batch, heads, seq], the others [batch, seq, heads, dim].
    joined = [torch.cat(column, dim=1 if i == 1 else 2) for i, column in enumerate(zip(*heads, strict=True))]
    ways.append(Way("each KV head alone", digest(*joined)))
    return Proof("batch_invariant", f"{dtype_name(dtype)}, forward and backward", ways)


def prove_decoding_batch_invariant(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Proof:
    """One query against many keys, where splitting the keys by heuristic would show."""
    q, k, v, _ = draw(dtype, device, 8, 1, sizes.keys)
    with deterministic_mode(True):
        digests = {size: digest(*in_batches(size, attend, q, k, v)) for size in (8, 4, 1)}
    ways = [Way(name, digests[size]) for name, size in (("batch of 8", 8), ("4 + 4", 4), ("8 x 1", 1))]
    return Proof("batch_invariant", f"{dtype_name(dtype)}, 1 query, {sizes.keys} keys", ways)


def prove_packing(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Proof:
    """Sequences of different lengths: packed, and each alone."""
    lengths = [sizes.seqlen, 1, sizes.seqlen // 3, 64]
    q, k, v, dout = (x[0] for x in draw(dtype, device, 1, sum(lengths), sum(lengths)))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    at, longest = ends.to(device), max(lengths)
    with deterministic_mode(True):
        out, lse, _ = flash_attn_varlen_func(q, k, v, at, at, longest, longest, causal=True, return_attn_probs=True)
    packed = out.detach(), lse.detach().t(), *torch.autograd.grad(out, (q, k, v), dout)
    spans = [slice(begin, end) for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False)]
    alone = [differentiate(*(x[None, span] for x in (q, k, v, dout))) for span in spans]
    rows = [tuple(x[0].t() if i == 1 else x[0] for i, x in enumerate(result)) for result in alone]
    joined = [torch.cat(column) for column in zip(*rows, strict=True)]
    ways = [Way(f"packed {lengths}", digest(*packed)), Way("each sequence alone", digest(*joined))]
    return Proof("batch_invariant", f"{dtype_name(dtype)}, forward and backward", ways)


def prove_schedule_invariant(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Proof:
    """A whole prefill, chunked prefills, and decoding row by row from contiguous and paged caches."""
    block = modes.key_block(device.type, dtype_name(dtype), DIM)
    split = sizes.blocks_of_split * block
    seqlen = 3 * split + 37
    q, k, v, _ = draw(dtype, device, 1, seqlen, seqlen)
    with deterministic_mode(True, split):
        ways = [Way(f"prefill of {seqlen}", digest(*attend(q, k, v)))]
        for chunk in (split, split // 2 + 13):
            ways.append(Way(f"prefill in chunks of {chunk}", digest(*prefill_in_chunks(q, k, v, chunk))))
        ways.append(Way("row by row, KV cache", digest(*decode(q, k, v, None))))
        table = page_table(seqlen, device)
        ways.append(
            Way("row by row, paged KV cache", digest(*decode(q, in_pages(k, table), in_pages(v, table), table)))
        )
        ways.append(Way("row by row, head by head", digest(*decode_heads(q, k, v))))
        crowd = (
            64 if device.type == "cuda" else 3
        )  # enough blocks to fill the device, so that each folds its own chunks
        many = [x.expand(crowd, *x.shape[1:]) for x in (q, k, v)]
        ways.append(Way(f"in a batch of {crowd}", digest(*(x[1:2] for x in attend(*many)))))
    return Proof("schedule_invariant", f"{dtype_name(dtype)}, split_size {split}", ways)


def join_rows(parts: list[Result]) -> Result:
    """(out, lse) of consecutive query rows, put together again."""
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def prefill_in_chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Result:
    """`chunk` queries at a time against the keys so far."""
    ends = [*range(chunk, q.shape[1], chunk), q.shape[1]]
    begins = [0, *ends[:-1]]
    parts = [attend(q[:, a:b], k[:, :b], v[:, :b]) for a, b in zip(begins, ends, strict=True)]
    return join_rows(parts)


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor | None) -> Result:
    """One query at a time against a cache that holds the keys so far (and, here, later ones that it must not see)."""
    parts = [
        flash_attn_with_kvcache(
            q[:, at : at + 1],
            k_cache,
            v_cache,
            cache_seqlens=at + 1,
            causal=True,
            block_table=table,
            return_softmax_lse=True,
        )
        for at in range(q.shape[1])
    ]
    return join_rows(parts)


def decode_heads(q: Tensor, k: Tensor, v: Tensor) -> Result:
    """`decode` with one head at a time: so few blocks that keys are split over several, and a kernel combines them."""
    group = HEADS_Q // HEADS_KV
    heads = []
    for head in range(HEADS_Q):
        mine = slice(head // group, head // group + 1)
        heads.append(decode(q[:, :, head : head + 1], k[:, :, mine], v[:, :, mine], None))
    outs, lses = zip(*heads, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=1)


def page_table(seqlen: int, device: torch.device) -> Tensor:
    """Pages in a shuffled order, int32 [1, pages]."""
    pages = -(-seqlen // PAGE_SIZE)
    return torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()[None].to(device)


def in_pages(x: Tensor, table: Tensor) -> Tensor:
    """[1, seqlen, heads, dim] as pages [pages, PAGE_SIZE, heads, dim] in the table's order."""
    pages = table.shape[1]
    padded = x.new_zeros(pages * PAGE_SIZE, *x.shape[2:])
    padded[: x.shape[1]] = x[0]
    cache = torch.empty_like(padded).view(pages, PAGE_SIZE, *x.shape[2:])
    cache[table[0].long()] = padded.view_as(cache)
    return cache
