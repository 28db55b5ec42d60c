"""Time and peak memory of calls, side by side: interleaved rounds in one process, CUDA events on a GPU, medians."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

# A round lasts at least this long for each contender, so that launch latency and the clock's resolution vanish.
ROUND_SECONDS = {"cuda": 0.01, "cpu": 0.05}
ROUNDS = {"cuda": 11, "cpu": 5}

Call = Callable[[], object]
Clock = Callable[[], float]  # seconds; on a GPU events are used instead


class Contender(NamedTuple):
    """Something to measure.

    prepare() makes inputs, runs a forward where a backward is to be measured, and returns the call; both happen inside
    context(), which is entered outside of what is timed. A contender that cannot do it raises RuntimeError.
    """

    name: str
    prepare: Callable[[], Call]
    context: Callable[[], AbstractContextManager] = nullcontext


class Measurement(NamedTuple):
    """What a call took: the median over rounds, all rounds, and memory above what was allocated before the call."""

    seconds: float
    rounds: list[float]
    peak_bytes: int | None  # None where the system does not tell


def measure(
    contenders: Sequence[Contender],
    device: torch.device,
    rounds: int | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Measures all contenders; returns their measurements and, of those that cannot do it, the reason."""
    rounds = ROUNDS[device.type] if rounds is None else rounds
    calls: dict[str, tuple[Contender, Call, int]] = {}
    peaks: dict[str, int | None] = {}
    refused: dict[str, str] = {}
    for contender in contenders:
        try:
            with contender.context():
                call = contender.prepare()
                peaks[contender.name] = peak_bytes(call, device)
                seconds = time_calls(call, 1, device, clock)
                repeats = max(1, round(ROUND_SECONDS[device.type] / seconds))
                time_calls(call, repeats, device, clock)  # clocks and caches settle
                calls[contender.name] = contender, call, repeats
        except RuntimeError as error:
            refused[contender.name] = str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
            if device.type == "cuda":
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for index in range(rounds):
        at = index % max(1, len(order))
        for name in order[at:] + order[:at]:  # nobody always comes first
            contender, call, repeats = calls[name]
            with contender.context():
                times[name].append(time_calls(call, repeats, device, clock))
    found = {name: Measurement(statistics.median(times[name]), times[name], peaks[name]) for name in calls}
    return found, refused


def time_calls(call: Call, repeats: int, device: torch.device, clock: Clock) -> float:
    """Seconds for one of `repeats` calls in a row."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000.0 / repeats
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that one call needs at its peak, results included, above what is allocated before."""
    call()  # what is allocated once and kept does not count
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return peak_resident_bytes(call)


def peak_resident_bytes(call: Call) -> int | None:
    """The same of the process's resident memory, as Linux tells it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status_bytes("VmRSS")
        call()
        return max(0, status_bytes("VmHWM") - before)
    except (AttributeError, OSError):
        return None


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
