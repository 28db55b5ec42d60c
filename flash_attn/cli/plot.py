"""Draws what `bench` measured. matplotlib is optional, and imported only here."""

from pathlib import Path
from typing import Any

MEMORY_OF = ("backward", "deterministic", "forward")  # the first that was measured


def require() -> None:
    """Fails early, before anything is measured.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("--plot: needs matplotlib, which is not installed (pip install matplotlib)") from None


def draw(results: dict[str, Any], path: Path) -> None:
    """TFLOP/s against sequence length, a row of panels for each pass, and a row of peak memory; columns: the rest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    passes = list(dict.fromkeys(row["which"] for row in rows))
    kinds = list(dict.fromkeys((row["dtype"], row["head_dim"], row["causal"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lengths = sorted({row["seqlen"] for row in rows})
    memory_of = next(which for which in MEMORY_OF if which in passes)
    panels = [*((which, "tflops", 1.0) for which in passes), (memory_of, "peak_bytes", 2.0**20)]
    size = (4.0 * len(kinds), 3.0 * len(panels))
    figure, axes = plt.subplots(len(panels), len(kinds), figsize=size, squeeze=False, sharex=True)
    for line, (which, value, unit) in enumerate(panels):
        for column, kind in enumerate(kinds):
            axis = axes[line][column]
            for index, name in enumerate(names):
                points = [
                    (row["seqlen"], row[value] / unit)
                    for row in rows
                    if (row["which"], row["contender"]) == (which, name)
                    and (row["dtype"], row["head_dim"], row["causal"]) == kind
                    and row[value]
                ]
                width = 2.2 if index == 0 else 1.2
                axis.plot(
                    *zip(*points, strict=True) if points else ([], []), "o-", label=name, linewidth=width, markersize=3
                )
            label = "deterministic backward" if which == "deterministic" else which
            label = label if value == "tflops" else f"memory of {label}"
            axis.set_title(f"{label}, {kind[0]}, d={kind[1]}, {'causal' if kind[2] else 'full'}", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
            axis.minorticks_off()
            if value == "peak_bytes":
                low, high = axis.get_ylim()
                axis.set_yscale("log", base=2)
                axis.set_ylim(low / 4, high * 4)  # equal needs must look equal
                axis.yaxis.set_major_formatter("{x:g}")
                axis.set_xlabel("sequence length")
            else:
                axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[line][0].set_ylabel("TFLOP/s" if value == "tflops" else "peak memory, MiB")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{results['device']}; torch {results['machine']['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
