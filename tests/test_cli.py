"""The commands of `python -m flash_attn`, and the classic benchmark, on small problems."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICES

from flash_attn import _library, deterministic_mode, modes
from flash_attn.__main__ import main
from flash_attn.cli import bench_features, correctness, devices, info, invariance, measure, model, plot, terminal, text
from flash_attn.reference import visible_keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
SMALL = invariance.Sizes(seqlen=70, keys=300, blocks_of_split=1, repeats=2)


@pytest.fixture
def few_checks(monkeypatch):
    """A part of the tables: the whole takes long and is what `verify` itself is for."""
    names = {"causal", "packed, causal", "everything"}
    chosen = tuple(case for case in correctness.FEATURES if case.name in names)
    assert len(chosen) == len(names)
    monkeypatch.setattr(correctness, "FEATURES", chosen)
    monkeypatch.setattr(invariance, "QUICK", SMALL)


def corrupt_forward(monkeypatch, spoil):
    """From now on the forward operator's output goes through spoil(out)."""
    forward = torch.ops.flash_attn.forward.default

    def corrupted(*arguments):
        out, lse, s_dmask = forward(*arguments)
        spoil(out)
        return out, lse, s_dmask

    monkeypatch.setattr(torch.ops.flash_attn.forward, "default", corrupted)


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_in_a_process_of_its_own():
    result = subprocess.run([sys.executable, "-m", "flash_attn", "info"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    built = devices.build_info()
    assert built["version"] in result.stdout
    assert all(arch in result.stdout for archs in built["archs"].values() for arch in archs)
    assert "kernels for" in result.stdout and "deterministic" in result.stdout and "performance" in result.stdout


def test_info_shows_the_modes(monkeypatch, capsys):
    assert main(["info"]) == 0
    assert "deterministic off (no split_size)" in capsys.readouterr().out
    monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, "1")
    with deterministic_mode(True, 256):
        assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "deterministic on (split_size 256)" in shown
    assert "performance   on" in shown and f"{modes.PERFORMANCE_VARIABLE}=1" in shown
    has_rtz = devices.build_info()["rtz"]
    assert f"cpu: {info.performance_mode('cpu', has_rtz)}" in shown
    assert "toward zero" in info.performance_mode("cpu", True) and "raise" in info.performance_mode("hip", False)
    assert "changes nothing here" in info.performance_mode("cuda", True)


def test_info_lists_the_key_blocks_that_the_kernels_use(capsys):
    main(["info"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("key block")]
    assert len(lines) == sum(len(devices.FLOAT_DTYPES[device]) for device in DEVICES)
    assert any(f"{modes.key_block('cpu', 'float32', 256)} keys up to head_dim 256" in line for line in lines)


def test_info_without_a_library_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(_library, "_problem", "the compiled library _C.abi3.so is missing from somewhere")
    assert main(["info"]) == 1
    assert "pip install ." in capsys.readouterr().out


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_verify_passes(few_checks, capsys, device):
    assert main(["verify", "--quick", "--device", device]) == 0
    shown = capsys.readouterr().out
    assert "all passed" in shown and "DIFFER" not in shown
    for guarantee in ("run_to_run", "batch_invariant", "schedule_invariant"):
        assert shown.count(guarantee) >= 2  # one for each dtype at least


def test_verify_passes_in_the_performance_mode(monkeypatch, capsys):
    if not devices.build_info()["rtz"]:
        pytest.skip("built with FLASH_ATTENTION_INTERNAL_USE_RTZ=0")
    monkeypatch.setenv(modes.PERFORMANCE_VARIABLE, "1")
    device = torch.device("cpu")
    for dtype in (torch.float16, torch.bfloat16):
        assert all(row.passed for case in correctness.FEATURES for row in correctness.check(case, dtype, device))
    # Measured by float16 itself the same results fail: the mode is on.
    monkeypatch.setattr(correctness, "product_dtype", lambda dtype, device: dtype)
    assert not all(row.passed for row in correctness.check(correctness.FEATURES[0], torch.float16, device))


def test_verify_sees_a_wrong_output(few_checks, monkeypatch, capsys):
    corrupt_forward(monkeypatch, lambda out: out[..., 0].add_(0.25))
    assert main(["verify", "--quick", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "error of out is" in shown and "FAILED on cpu" in shown


def test_verify_sees_a_nan(few_checks, monkeypatch):
    corrupt_forward(monkeypatch, lambda out: out.flatten()[:1].fill_(torch.nan))
    assert main(["verify", "--quick", "--device", "cpu"]) == 1


def test_verify_sees_bits_that_depend_on_the_batch(few_checks, monkeypatch, capsys):
    """One unit in the last place: far below any error limit."""

    def nudge(out):
        if out.dim() == 4 and out.shape[0] == 8:
            out.flatten()[:1].mul_(1.0 + torch.finfo(out.dtype).eps)

    corrupt_forward(monkeypatch, nudge)
    assert main(["verify", "--quick", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "DIFFER" in shown and "is allowed" not in shown


def test_verify_sees_a_wrong_gradient(few_checks, monkeypatch, capsys):
    backward = torch.ops.flash_attn.backward.default

    def corrupted(*arguments):
        delta = backward(*arguments)
        arguments[7].mul_(1.1)  # dq
        return delta

    monkeypatch.setattr(torch.ops.flash_attn.backward, "default", corrupted)
    assert main(["verify", "--quick", "--device", "cpu"]) == 1
    assert "error of dq is" in capsys.readouterr().out


def test_verify_goes_on_after_an_exception(few_checks, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(correctness, "flash_attn_varlen_func", broken)
    assert main(["verify", "--quick", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in shown and "everything" in shown


def test_every_feature_and_head_dim_of_the_table(device, dtype):
    """The rows that the tests above leave out, and the limits that `verify` sets."""
    for case in (*correctness.FEATURES, *correctness.HEAD_DIMS):
        faults = [found for found in correctness.check(case, dtype, torch.device(device)) if not found.passed]
        assert not faults, (case.name, faults)


def test_digest_is_of_bits():
    x = torch.tensor([0.0, 1.0])
    assert invariance.digest(x) == invariance.digest(x.clone())
    assert invariance.digest(x) != invariance.digest(-x)  # -0.0 is another bit pattern
    assert invariance.digest(x, x) == invariance.digest(torch.cat([x, x]))


def test_unusable_devices_are_refused():
    with pytest.raises(SystemExit, match="must be cpu or cuda, got meta"):
        main(["verify", "--device", "meta"])
    if "cuda" not in DEVICES:
        with pytest.raises(SystemExit, match="cuda cannot be used"):
            main(["bench", "--device", "cuda"])


def test_info_with_a_variable_that_is_not_understood(monkeypatch, capsys):
    monkeypatch.setenv(modes.DETERMINISTIC_VARIABLE, "on")
    assert main(["info"]) == 1
    assert f"{modes.DETERMINISTIC_VARIABLE}: must be 0 or 1, got 'on'" in capsys.readouterr().out


def test_unknown_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--device", "gpu0"])
    assert "argument --device: must be cpu, cuda or cuda:1, got gpu0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "bench", "demo"])
def test_without_a_library_commands_say_what_to_do(monkeypatch, command):
    monkeypatch.setattr(_library, "_problem", "the compiled library _C.abi3.so is missing from somewhere")
    with pytest.raises(SystemExit, match=r"is missing from somewhere \(rebuild with `pip install"):
        main([command])


# ---- bench -----------------------------------------------------------------------------------------------------------

TINY = ["--seqlen", "32", "64", "--head-dim", "32", "--tokens", "64", "--hidden", "64", "--rounds", "2"]


def test_bench_writes_json(tmp_path, capsys, device):
    file = tmp_path / "bench.json"
    assert main(["bench", "--device", device, "--dtype", "fp32", *TINY, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    ours = [row for row in results["rows"] if row["contender"] == "flash_attn"]
    assert len(ours) == 3 * 2 * 2  # passes, causal, lengths
    for row in results["rows"]:
        flops = 4 * row["batch"] * row["heads"] * row["seqlen"] ** 2 * row["head_dim"]
        flops *= (0.5 if row["causal"] else 1.0) * (1.0 if row["which"] == "forward" else 2.5)
        assert row["batch"] * row["seqlen"] == 64 and row["heads"] * row["head_dim"] == 64
        assert row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12)
        assert len(row["seconds_of_rounds"]) == 2 and min(row["seconds_of_rounds"]) > 0.0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    assert results["machine"]["torch"] == torch.__version__
    assert {row["contender"] for row in results["rows"]} >= {"flash_attn", "math"}
    assert "Peak memory" in capsys.readouterr().out


def test_bench_counts_cpu_time_of_one_thread(tmp_path, capsys):
    file, threads = tmp_path / "bench.json", torch.get_num_threads()
    command = ["bench", "--device", "cpu", "--passes", "forward", "--dtype", "fp32", "--peers", "math", "--cpu-time"]
    try:
        assert main([*command, *TINY, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(file.read_text())
    assert results["clock"] == "CPU time of one thread" and "1 threads" in results["device"]
    assert results["machine"]["torch_threads"] == 1


def test_bench_loads_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    command = [
        "bench",
        "--device",
        "cpu",
        "--passes",
        "forward",
        "--causal",
        "yes",
        "--dtype",
        "bf16",
        "--peers",
        "math",
    ]
    assert main([*command, *TINY, "--json", str(file)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forward")]
    assert main(["bench", "--load", str(file), "--plot", str(picture)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("forward")] == table
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_of_features_and_decoding(tmp_path, capsys, device):
    file = tmp_path / "bench.json"
    chosen = [
        "--tables",
        "features",
        "decoding",
        "--passes",
        "forward",
        "backward",
        "--dtype",
        "fp32",
        "--peers",
        "math",
    ]
    sizes = ["--seqlen", "256", "--tokens", "256", "--head-dim", "32", "--hidden", "64", "--rounds", "2"]
    assert main(["bench", "--device", device, *chosen, *sizes, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    rows = {(row["which"], row["feature"]): row for row in results["features"]}
    assert rows["forward", "plain"]["of_plain"] == rows["backward", "plain"]["of_plain"] == 1.0
    assert any(name.startswith("split_size") for which, name in rows if which == "forward")
    assert not any(name.startswith("split_size") for which, name in rows if which == "backward")
    plain, causal = rows["forward", "plain"], rows["forward", "causal"]  # causal: 3 blocks of 4
    assert causal["of_plain"] == pytest.approx(0.75 * plain["seconds"] / causal["seconds"])
    caches = {row["batch"] for row in results["decoding"]}
    names = {row["contender"] for row in results["decoding"]}
    assert len(caches) > 1
    assert names == {"flash_attn", "pages of 16", "appending", "deterministic", "split_size 2048", "math"}
    assert all(row["bytes_per_second"] > 0 for row in results["decoding"])
    assert main(["bench", "--load", str(file)]) == 0
    loaded = capsys.readouterr().out
    assert loaded[loaded.index("Features") :].strip() in printed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (130, 0), (5, 300), (-1, 127)])
@pytest.mark.parametrize("length", [1, 128, 700])
def test_visited_blocks(length, window_size, causal):
    mask = visible_keys(length, length, window_size[0], 0 if causal else window_size[1])
    tiles = (tile for rows in mask.split(bench_features.BLOCK) for tile in rows.split(bench_features.BLOCK, 1))
    assert bench_features.visited_blocks(length, causal, window_size) == sum(bool(tile.any()) for tile in tiles)


def test_bench_refuses_to_load_what_is_no_result(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for file in (broken, tmp_path / "missing.json"):
        with pytest.raises(SystemExit, match=f"--load: .*{file.name} cannot be read"):
            main(["bench", "--load", str(file)])


def test_plot_without_matplotlib_fails_before_measuring(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(measure, "time_calls", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        main(["bench", "--device", "cpu", *TINY, "--plot", "never.png"])
    assert plot.MEMORY_OF


def test_bench_refuses_unknown_peers():
    with pytest.raises(SystemExit, match="--peers: on cpu they are default, flash, math, got cudnn"):
        main(["bench", "--device", "cpu", *TINY, "--peers", "cudnn"])


def test_a_peer_that_cannot_run_is_left_out_with_its_reason():
    def refuses():
        raise RuntimeError("No available kernel\nand more")

    contenders = [measure.Contender("good", lambda: lambda: torch.ones(4)), measure.Contender("bad", refuses)]
    found, refused = measure.measure(contenders, torch.device("cpu"), rounds=2)
    assert list(found) == ["good"] and refused == {"bad": "No available kernel"}


def test_measurement_is_of_the_call(monkeypatch):
    """A call that sleeps ten times as long as another takes about ten times as long, whatever the order."""
    import time

    contenders = [measure.Contender(str(ms), lambda ms=ms: lambda: time.sleep(ms / 1000)) for ms in (20, 2)]
    monkeypatch.setitem(measure.ROUND_SECONDS, "cpu", 0.01)
    found, _ = measure.measure(contenders, torch.device("cpu"), rounds=3)
    assert 0.002 <= found["2"].seconds < found["20"].seconds and found["20"].seconds >= 0.02


def test_peak_memory_of_a_call():
    """64 MiB held during the call are seen, wholly, within what a busy process may add or free meanwhile."""
    peak = measure.peak_bytes(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 * 2**20 < peak < 80 * 2**20


@pytest.mark.parametrize("arguments", [[], ["--dropout", "0.2", "--causal"]])
def test_classic_benchmark(monkeypatch, capsys, tmp_path, arguments):
    file = tmp_path / "classic.json"
    script = str(ROOT / "benchmarks" / "benchmark_flash_attention.py")
    settings = ["--device", "cpu", "--seqlen", "64", "--heads", "2", "--rounds", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [script, *settings, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6 and {row["contender"] for row in rows} == {"standard", "flash_attn"}
    assert capsys.readouterr().out.count("x") >= 3


def test_standard_attention_is_attention():
    namespace = runpy.run_path(str(ROOT / "benchmarks" / "benchmark_flash_attention.py"))
    q, k, v = (torch.randn(2, 9, 3, 8, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        ).transpose(1, 2)
        # Probabilities are formed in float32.
        assert torch.allclose(namespace["standard_attention"](q, k, v, 0.0, causal), expected, atol=1e-6)


# ---- demo ------------------------------------------------------------------------------------------------------------

LITTLE = ["--steps", "3", "--layers", "1", "--width", "32", "--seqlen", "16", "--batch", "2", "--sample", "4"]


def test_demo(few_checks, capsys, device):
    assert main(["demo", "--device", device, *LITTLE]) == 0
    shown = capsys.readouterr().out
    assert "everything held" in shown and "DIFFER" not in shown
    assert shown.count("3/3") == 2  # both runs' bars
    assert modes.get_deterministic_mode() == (False, None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_demo_refuses_sizes_that_make_no_sense(capsys):
    """No steps would prove nothing."""
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "0"])
    assert "argument --steps: must be an int from 1 on, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--width: must be a multiple of 8, got 30"):
        main(["demo", "--width", "30"])


def test_demo_sees_runs_that_differ(few_checks, monkeypatch, capsys):
    calls = []

    def drift(*arguments):
        calls.append(arguments)
        trained, losses = train(*arguments)
        if len(calls) == 2:
            trained.norm.bias.data[0] += 1e-7
        return trained, losses

    train = model.train
    monkeypatch.setattr(model, "train", drift)
    assert main(["demo", "--device", "cpu", *LITTLE]) == 1
    shown = capsys.readouterr().out
    assert "DIFFER" in shown and "1 FAILED" in shown


def test_text_is_prose_and_tokens_are_reversible():
    corpus = text.corpus()
    assert len(corpus) > 50_000 and corpus.isascii()
    vocabulary = text.Vocabulary(corpus, 500)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 500
    tokens = vocabulary.encode(corpus)
    assert vocabulary.decode(tokens.tolist()) == corpus
    assert len(tokens) < 0.6 * len(corpus)  # words, not letters
    assert text.Vocabulary(corpus, 1).tokens == sorted(set(corpus))  # letters are never left out


def test_text_without_the_manual(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert len(text.corpus()) > 10_000


def test_writing_with_a_cache_is_writing_without():
    """Logits of cached steps against those of the whole sequence at once."""
    torch.manual_seed(0)
    settings = model.Settings(layers=2, width=32, heads=2)
    network = model.LanguageModel(50, settings)
    tokens = torch.randint(50, (1, 12))
    with torch.no_grad():
        whole = network(tokens)
        cache = model.new_cache(1, 12)
        steps = []
        for begin, end in ((0, 5), (5, 6), (6, 12)):
            steps.append(network(tokens[:, begin:end], cache))
            cache.seqlen_offset += end - begin
    # Float32 sums in another order, over layers of width 32.
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)


def test_learning_rate_rises_and_falls():
    settings = model.Settings(steps=100, learning_rate=1.0)
    rates = [model.learning_rate(step, settings) for step in range(100)]
    assert max(rates) == 1.0 and rates[0] == pytest.approx(0.1) and 0.0 < rates[-1] < 0.02


def test_progress_bar(capsys):
    progress = terminal.Progress("run", 10)
    for _ in range(10):
        progress.advance("note")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "10/10" in lines[-1] and lines[-1].endswith("note")  # a line for every fifth


# ---- the README ------------------------------------------------------------------------------------------------------


def test_example_of_the_readme_runs():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(compile(block.split("```", maxsplit=1)[0], "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_that_pages_name_exist(page):
    page = ROOT / page
    content = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", content)
    files = re.findall(r"`((?:csrc|docs|flash_attn|tests|tools|benchmarks)/[\w/.]*\.\w+)`", content)
    for target in [page.parent / link for link in links] + [ROOT / file for file in files]:
        assert target.exists(), target
