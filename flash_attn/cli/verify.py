"""Correctness against the float64 reference and the guarantees' bits, as tables; the exit code tells if all hold."""

import argparse
import time
from collections.abc import Sequence

import torch

from flash_attn.cli import correctness, devices, invariance
from flash_attn.cli.correctness import Case, Comparison
from flash_attn.cli.terminal import Table, title

DIGITS = 16  # of a digest's 64, in tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--quick`"""
    devices.add_device_argument(parser)
    parser.add_argument("--quick", action="store_true", help="float32 and bfloat16 only, smaller problems")


def run(options: argparse.Namespace) -> int:
    """Prints the tables; 0 where every row passed."""
    start = time.perf_counter()
    device = devices.choose(options.device)
    print(f"{device}: {devices.describe(device)}")
    dtypes = (torch.float32, torch.bfloat16) if options.quick else devices.FLOAT_DTYPES[device.type]
    cases = correctness.FEATURES if options.quick else (*correctness.FEATURES, *correctness.HEAD_DIMS)
    failures = check_features(cases, dtypes, device)
    failures += check_guarantees(dtypes, device, invariance.QUICK if options.quick else invariance.Sizes())
    seconds = time.perf_counter() - start
    if failures:
        print(f"\nverify: {failures} FAILED on {device} ({seconds:.0f} s)")
        return 1
    print(f"\nverify: all passed on {device} ({seconds:.0f} s)")
    return 0


def check_features(cases: Sequence[Case], dtypes: Sequence[torch.dtype], device: torch.device) -> int:
    """Prints errors against float64, forward and backward, a row for each feature; returns the number of failures."""
    title("Against the float64 reference: largest error of out / of the gradients")
    names = [devices.dtype_name(dtype) for dtype in dtypes]
    table = Table(("feature", "<31"), *((name, "<19") for name in names), ("verdict", "<7"))
    failures = 0
    for case in cases:
        cells, faults = [], []
        for name, dtype in zip(names, dtypes, strict=True):
            try:
                comparisons = list(correctness.check(case, dtype, device))
            except Exception as error:  # a kernel that raises fails its row, and the table goes on
                cells.append("raised")
                faults.append(f"{name}: {type(error).__name__}: {error}")
                continue
            cells.append(summary(comparisons))
            faults += [f"{name}: {fault(comparison)}" for comparison in comparisons if not comparison.passed]
        table.row(case.name, *cells, "FAILED" if faults else "ok")
        for text in faults:
            print(f"    {text}")
        failures += bool(faults)
    return failures


def summary(comparisons: Sequence[Comparison]) -> str:
    """`3.0e-07 / 5.6e-07`: of out, and the largest of the gradients."""
    errors = {comparison.name: comparison.error for comparison in comparisons}
    gradient = max(error for name, error in errors.items() if name.startswith("d"))
    return f"{errors['out']:.1e} / {gradient:.1e}"


def fault(comparison: Comparison) -> str:
    """What is wrong, with the limit."""
    return f"error of {comparison.name} is {comparison.error:.2e}, at most {comparison.limit:.2e} is allowed"


def check_guarantees(dtypes: Sequence[torch.dtype], device: torch.device, sizes: invariance.Sizes) -> int:
    """Prints the digests of every way to compute the same; returns the number of guarantees that do not hold."""
    title(f"The same bits: SHA-256 (first {DIGITS} digits) of the results")
    table = Table(("guarantee", "<18"), ("of", "<34"), ("computed as", "<28"), ("SHA-256", f"<{DIGITS}"), ("", "<6"))
    failures = 0
    for dtype in dtypes:
        for proof in invariance.prove_all(dtype, device, sizes):
            for index, way in enumerate(proof.ways):
                same = way.digest == proof.ways[0].digest
                labels = (proof.guarantee, proof.problem) if index == 0 else ("", "")
                verdict = "" if index == 0 else "same" if same else "DIFFER"
                table.row(*labels, way.name, way.digest[:DIGITS], verdict)
            failures += not proof.passed
    return failures
