"""Runs the gfx90a kernels of `make hip` in the emulator, on torch CPU tensors.

Mirrors what csrc/cuda/launch.cu does around the kernels: parameters, workspace, the order of launches.
"""

import ctypes
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.build.hip_kernels import CompiledKernel

EMULATOR = Path(__file__).resolve().parents[3] / "shared" / "tools"
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def is_available() -> bool:
    return (EMULATOR / "amdemu").is_dir()


def amdemu() -> Any:
    if str(EMULATOR) not in sys.path:
        sys.path.insert(0, str(EMULATOR))
    import amdemu
    import amdemu.codeobject
    import amdemu.compile

    return amdemu


# ---- csrc/core/params.h ----------------------------------------------------------------------------------------------


class TensorRef(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch_stride", "row_stride", "head_stride")]


class RowsRef(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch_stride", "head_stride")]


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class SoftcapSeries(ctypes.Structure):
    """Left at zero: AMD's tanh is no series."""

    _fields_ = [("coefficients", ctypes.c_float * 4), *_fields(ctypes.c_float, "end exponent exponent_end twice_cap")]


class AttentionParams(ctypes.Structure):
    _fields_ = [
        *_fields(TensorRef, "q k v out"),
        ("lse", RowsRef),
        *_fields(ctypes.c_int32, "batch heads_q heads_kv head_dim seqlen_q seqlen_k total_q total_k"),
        *_fields(ctypes.c_int64, "cu_seqlens_q cu_seqlens_k seqused_k"),
        ("softmax_scale", ctypes.c_double),
        ("softcap", ctypes.c_float),
        *_fields(ctypes.c_int32, "window_left window_right"),
        *_fields(ctypes.c_int64, "alibi_slopes alibi_batch_stride sink"),
        ("dropout_p", ctypes.c_float),
        ("rng_state", ctypes.c_int64),
        ("dtype", ctypes.c_int8),
        *_fields(ctypes.c_bool, "performance_mode aligned"),
        *_fields(ctypes.c_int32, "head_group"),
        ("softcap_series", SoftcapSeries),
    ]


class ForwardParams(AttentionParams):
    _fields_ = [
        *_fields(ctypes.c_int32, "split_size num_splits"),
        ("deterministic", ctypes.c_bool),
        *_fields(ctypes.c_int64, "partial_out partial_max partial_sum s_dmask"),
        ("rows_are_heads", ctypes.c_bool),
        *_fields(ctypes.c_int64, "tiles_taken block_table block_table_stride"),
        *_fields(ctypes.c_int32, "pages page_size"),
        ("page_inverse", ctypes.c_uint32),
    ]


class BackwardParams(AttentionParams):
    _fields_ = [
        *_fields(TensorRef, "dout dq dk dv"),
        *_fields(RowsRef, "dlse delta"),
        *_fields(ctypes.c_int64, "dq_accum dq_turn"),
        *_fields(ctypes.c_int32, "dq_lag dq_heads"),
        *_fields(ctypes.c_int64, "dq_progress blocks_taken"),
        ("deterministic", ctypes.c_bool),
    ]


class AppendParams(ctypes.Structure):
    _fields_ = [
        *_fields(TensorRef, "q rotated_q k v k_cache v_cache"),
        *_fields(ctypes.c_int32, "batch heads_q heads_kv head_dim seqlen_q seqlen_new"),
        *_fields(ctypes.c_int64, "block_table block_table_stride"),
        *_fields(ctypes.c_int32, "pages page_size pages_of_sequence"),
        *_fields(ctypes.c_int64, "seqlens seqlens_after rotary_cos rotary_sin cos_stride sin_stride"),
        *_fields(ctypes.c_int32, "rotary_pairs rotary_positions"),
        *_fields(ctypes.c_bool, "tables_are_accum interleaved queries_advance"),
        ("dtype", ctypes.c_int8),
        ("aligned", ctypes.c_bool),
    ]


def tensor_ref(x: Tensor) -> TensorRef:
    """Of [batch, seq, heads, dim], or packed [total, heads, dim]."""
    batch_stride = x.stride(0) if x.dim() == 4 else 0
    return TensorRef(x.data_ptr(), batch_stride, x.stride(-3), x.stride(-2))


def rows_ref(x: Tensor) -> RowsRef:
    """Of [batch, heads, seq], or packed [heads, total]."""
    return RowsRef(x.data_ptr(), x.stride(0) if x.dim() == 3 else 0, x.stride(-2))


def are_aligned(*tensors: Tensor) -> bool:
    """Whether all of them allow 16-byte access."""
    return all(
        x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in (*x.stride()[:-1], x.shape[-1]))
        for x in tensors
    )


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One call: [batch, seq, heads, dim] tensors, or packed ones with cu_seqlens. Arguments are the reference's."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    s_aux: Tensor | None = None
    dropout_p: float = 0.0
    dropout_mask: Tensor | None = None  # for the reference: the kernels draw it themselves
    rng_state: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None  # of k and v, which are then [pages, page_size, heads, dim]
    split_size: int = 0
    num_splits: int = 1
    want_dmask: bool = False
    performance_mode: bool = False
    keep_alive: list[Tensor] = field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return len(self.cu_seqlens_q) - 1 if self.cu_seqlens_q is not None else self.q.shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.max_seqlen_q if self.is_packed else self.q.shape[1]

    @property
    def seqlen_k(self) -> int:
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return self.max_seqlen_k if self.is_packed else self.k.shape[1] * pages

    @property
    def is_modified(self) -> bool:
        scale_is_usual = self.softmax_scale is None or self.softmax_scale > 0
        features = self.softcap > 0 or self.alibi_slopes is not None or self.dropout_p > 0 or self.want_dmask
        return features or not scale_is_usual or not self.is_aligned

    @property
    def uses_performance_mode(self) -> bool:
        return self.performance_mode and self.q.element_size() == 2

    @property
    def is_aligned(self) -> bool:
        return are_aligned(self.q, self.k, self.v)

    def pointer(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        self.keep_alive.append(x)
        return x.data_ptr()

    def new_rows(self) -> Tensor:
        shape = (self.q.shape[-2], self.q.shape[0]) if self.is_packed else (self.batch, self.q.shape[-2], self.seqlen_q)
        return torch.full(shape, torch.nan)

    def fill(self, p: Any, out: Tensor, lse: Tensor) -> None:
        """The fields that the forward and the backward share."""
        self.keep_alive += [self.q, self.k, self.v, out, lse]
        p.q, p.k, p.v, p.out = (tensor_ref(x) for x in (self.q, self.k, self.v, out))
        p.lse = rows_ref(lse)
        p.batch, p.heads_q, p.heads_kv, p.head_dim = self.batch, self.q.shape[-2], self.k.shape[-2], self.q.shape[-1]
        p.seqlen_q, p.seqlen_k = self.seqlen_q, self.seqlen_k
        p.total_q = self.q.shape[0] if self.is_packed else self.batch * self.seqlen_q
        p.total_k = self.k.shape[0] if self.is_packed else self.batch * self.seqlen_k
        p.cu_seqlens_q, p.cu_seqlens_k = self.pointer(self.cu_seqlens_q), self.pointer(self.cu_seqlens_k)
        p.seqused_k = self.pointer(self.seqused_k)
        p.softmax_scale = self.softmax_scale if self.softmax_scale is not None else self.q.shape[-1] ** -0.5
        p.softcap = self.softcap
        p.window_left, p.window_right = self.window_size[0], 0 if self.causal else self.window_size[1]
        p.alibi_slopes = self.pointer(self.alibi_slopes)
        p.alibi_batch_stride = 0
        if self.alibi_slopes is not None and self.alibi_slopes.dim() == 2:
            p.alibi_batch_stride = self.alibi_slopes.stride(0)
        p.sink = self.pointer(self.s_aux)
        p.dropout_p, p.rng_state = self.dropout_p, self.pointer(self.rng_state)
        p.dtype = list(DTYPES).index(self.q.dtype)
        p.performance_mode, p.aligned, p.head_group = self.performance_mode, self.is_aligned, 1


class Emulator:
    """forward() and backward() as the GPU backend does them."""

    def __init__(self, kernels: list[CompiledKernel]):
        rows = ((kernel, kernel.instance) for kernel in kernels)
        self.kernels = {(x.family.name, x.dtype, x.head_dim, x.modified, x.performance): kernel for kernel, x in rows}
        self.codes: dict[str, Any] = {}  # loaded code objects: decoding takes longer than running
        self.statistics: dict[str, dict[str, Any]] = {}

    def find(
        self,
        family: str,
        dtype: torch.dtype,
        head_dim: int = 0,
        modified: bool = False,
        performance: bool = False,
    ) -> CompiledKernel:
        """The instance of the smallest compiled head dimension that holds head_dim; skips the test without one."""
        name = DTYPES[dtype]
        kind = (family, name, modified, performance)
        sizes = [size for *names, size, m, p in self.kernels if (*names, m, p) == kind]
        size = min((size for size in sizes if size >= head_dim), default=None)
        if size is None:
            pytest.skip(f"no {family} was compiled for {name} and head_dim {head_dim}")
        return self.kernels[family, name, size, modified, performance]

    def code(self, kernel: CompiledKernel) -> Any:
        """The code object, decoded."""
        return amdemu().codeobject.load(str(kernel.code), None, self.symbol(kernel))

    def symbol(self, kernel: CompiledKernel) -> str:
        return kernel.resources.name

    def run(self, kernel: CompiledKernel, p: Any, memory: list[Tensor], more_shared_bytes: int = 0) -> None:
        """One launch, with every check that the emulator has: bounds, LDS races, uninitialised values."""
        blocks = kernel.info.blocks(ctypes.byref(p))
        if blocks == 0:
            return
        name = kernel.instance.name
        if name not in self.codes:
            self.codes[name] = self.code(kernel)
        self.statistics[name] = amdemu().launch(
            self.codes[name],
            self.symbol(kernel),
            grid=(blocks, 1, 1),
            block=kernel.info.threads,
            args=[bytes(p)],
            shared_bytes=kernel.info.shared_bytes + more_shared_bytes,
            mem=memory,
            max_insts=200_000_000,
        )

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
        """out, lse, s_dmask or None."""
        dtype, dim = problem.q.dtype, problem.q.shape[-1]
        kernel = self.find("Forward", dtype, dim, problem.is_modified, problem.uses_performance_mode)
        out, lse = torch.full(problem.q.shape, torch.nan, dtype=dtype), problem.new_rows()
        p = ForwardParams()
        problem.fill(p, out, lse)
        p.split_size, p.num_splits = problem.split_size, problem.num_splits
        if problem.block_table is not None:
            p.block_table, p.block_table_stride = problem.pointer(problem.block_table), problem.block_table.stride(0)
            p.pages, p.page_size = problem.k.shape[:2]
            p.page_inverse = 0xFFFFFFFF // p.page_size
        dmask = None
        if problem.want_dmask:
            dmask = torch.zeros(problem.batch, p.heads_q, p.seqlen_q, p.seqlen_k, dtype=dtype)
            p.s_dmask = problem.pointer(dmask)
        if problem.num_splits > 1:
            shape = (problem.num_splits, problem.batch, p.heads_q, p.seqlen_q)
            partial_out, partial_max, partial_sum = (torch.full(s, torch.nan) for s in ((*shape, dim), shape, shape))
            p.partial_out, p.partial_max, p.partial_sum = map(problem.pointer, (partial_out, partial_max, partial_sum))
        may_fold = problem.num_splits == 1 and problem.split_size > 0
        self.run(kernel, p, problem.keep_alive, kernel.info.stash_bytes if may_fold else 0)
        if problem.num_splits > 1:
            self.run(self.find("Combine", dtype), p, problem.keep_alive)
        return out, lse, dmask

    def backward(
        self,
        problem: Problem,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None = None,
        deterministic: bool = False,
    ) -> list[Tensor]:
        """dq, dk, dv."""
        dtype, dim = problem.q.dtype, problem.q.shape[-1]
        kernel = self.find("Backward", dtype, dim, problem.is_modified, problem.uses_performance_mode)
        gradients = [torch.full(x.shape, torch.nan, dtype=dtype) for x in (problem.q, problem.k, problem.v)]
        delta = problem.new_rows()
        p = BackwardParams()
        problem.fill(p, out, lse)
        p.dout = tensor_ref(dout)
        p.dq, p.dk, p.dv = map(tensor_ref, gradients)
        p.delta = rows_ref(delta)
        if dlse is not None:
            p.dlse = rows_ref(dlse)
            problem.keep_alive.append(dlse)
        block_m = kernel.info.block_m
        blocks = problem.batch * -(-p.seqlen_q // block_m)
        if problem.is_packed:
            blocks = (p.total_q + problem.batch * block_m) // block_m
        dq_accum = torch.zeros(p.heads_q * blocks * block_m * kernel.instance.head_dim)
        dq_turn = torch.zeros(p.heads_q * blocks, dtype=torch.int32)
        p.dq_accum = problem.pointer(dq_accum)
        p.dq_turn = problem.pointer(dq_turn) if deterministic else 0
        p.deterministic = deterministic
        problem.keep_alive += [dout, *gradients, delta]
        narrows_dout = problem.uses_performance_mode and dtype == torch.float16
        self.run(self.find("Preprocess", dtype, dim, performance=narrows_dout), p, problem.keep_alive)
        self.run(kernel, p, problem.keep_alive)
        self.run(self.find("FinishDq", dtype, dim), p, problem.keep_alive)
        return gradients

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        caches: tuple[Tensor, Tensor],
        seqlens: Tensor,
        block_table: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """q, rotated, and the lengths afterwards; queries advance."""
        rotated, after = torch.full_like(q, torch.nan), torch.full_like(seqlens, -1)
        p = AppendParams()
        p.q, p.k, p.v, p.k_cache, p.v_cache = map(tensor_ref, (q, k, v, *caches))
        p.batch, p.seqlen_q, p.heads_q, p.head_dim = q.shape
        p.seqlen_new, p.heads_kv = k.shape[1:3]
        p.pages, p.page_size = caches[0].shape[:2]
        p.pages_of_sequence = 1
        p.seqlens, p.seqlens_after = seqlens.data_ptr(), after.data_ptr()
        memory = [q, rotated, k, v, *caches, seqlens, after]
        if block_table is not None:
            p.block_table, p.block_table_stride = block_table.data_ptr(), block_table.stride(0)
            p.pages_of_sequence = block_table.shape[1]
            memory.append(block_table)
        if rotary is not None:
            p.rotated_q = tensor_ref(rotated)
            p.rotary_cos, p.rotary_sin = (x.data_ptr() for x in rotary)
            p.cos_stride, p.sin_stride = (x.stride(0) for x in rotary)
            p.rotary_positions, p.rotary_pairs = rotary[0].shape
            p.tables_are_accum = rotary[0].dtype == torch.float32
            memory += rotary
        p.interleaved, p.queries_advance = interleaved, True
        p.dtype, p.aligned = list(DTYPES).index(q.dtype), are_aligned(q, k, v, *caches)
        self.run(self.find("Append", q.dtype), p, memory)
        return rotated, after
