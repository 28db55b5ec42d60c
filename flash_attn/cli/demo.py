"""The main job: what was built, correctness, invariance, and a language model trained twice to the same bits."""

import argparse
import os
import time
from functools import partial

import torch

from flash_attn import __version__, deterministic_mode, modes
from flash_attn.cli import correctness, devices, invariance, model, text, verify
from flash_attn.cli.invariance import digest
from flash_attn.cli.terminal import Progress, Table, title

DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = ("If ", "A class ")
ROWS_OF_LOSSES = 8
TEMPERATURE = 0.5
DEFAULT = model.Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The device and the language model's sizes."""
    devices.add_device_argument(parser)
    parser.add_argument(
        "--steps", type=positive, default=DEFAULT.steps, help="of training, twice (default %(default)s)"
    )
    parser.add_argument("--layers", type=positive, default=DEFAULT.layers)
    parser.add_argument(
        "--width", type=positive, default=DEFAULT.width, help=f"of the model, for {DEFAULT.heads} heads"
    )
    parser.add_argument("--seqlen", type=positive, default=DEFAULT.seqlen)
    parser.add_argument("--batch", type=positive, default=DEFAULT.batch)
    parser.add_argument(
        "--vocabulary", type=positive, default=2048, help="letters and frequent words (default %(default)s)"
    )
    parser.add_argument(
        "--sample", type=positive, default=60, help="tokens to write after training (default %(default)s)"
    )


def positive(argument: str) -> int:
    """An int from 1 on; argparse shows the message of an error."""
    if not argument.isdecimal() or int(argument) < 1:
        raise argparse.ArgumentTypeError(f"must be an int from 1 on, got {argument}")
    return int(argument)


def run(options: argparse.Namespace) -> int:
    """The four parts; 0 where everything held."""
    start = time.perf_counter()
    if options.width % (2 * DEFAULT.heads):  # heads' elements are rotated in pairs
        raise SystemExit(f"--width: must be a multiple of {2 * DEFAULT.heads}, got {options.width}")
    device = devices.choose(options.device)
    show_what_is_there(device)
    failures = verify.check_features(correctness.FEATURES, DTYPES, device)
    failures += verify.check_guarantees(DTYPES, device, invariance.QUICK)
    failures += train_twice(options, device)
    seconds = time.perf_counter() - start
    print(f"\ndemo: {f'{failures} FAILED' if failures else 'everything held'}, on {device}, in {seconds:.0f} s")
    return 1 if failures else 0


def show_what_is_there(device: torch.device) -> None:
    """The build in three lines."""
    built = devices.build_info()
    title(f"flash_attn {__version__}")
    archs = "; ".join(f"{backend}: {', '.join(built['archs'][backend])}" for backend in built["backends"])
    print(f"built for   {archs}")
    print(f"running on  {devices.describe(device)} ({devices.processor_name()})")
    print(f"with        torch {torch.__version__}")


def train_twice(options: argparse.Namespace, device: torch.device) -> int:
    """Trains, writes, and compares the runs' losses, weights and texts; returns the number of differences."""
    title("A small causal language model, trained twice with deterministic attention")
    settings = model.Settings(
        steps=options.steps,
        layers=options.layers,
        width=options.width,
        seqlen=options.seqlen,
        batch=options.batch,
    )
    corpus = text.corpus()
    vocabulary = text.Vocabulary(corpus, options.vocabulary)
    tokens = vocabulary.encode(corpus)
    print(f"text: Python's manual, {len(corpus)} characters, {len(tokens)} tokens of {len(vocabulary.tokens)} kinds")
    split = 4 * modes.key_block(device.type, "float32", settings.width // settings.heads)
    runs = []
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it matrix products on NVIDIA may differ
    switch = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # for the rest of torch; attention has its own switch
    try:
        with deterministic_mode(True, split):
            for number in (1, 2):
                report = partial(show_loss, Progress(f"run {number} of 2", settings.steps))
                trained, losses = model.train(tokens, len(vocabulary.tokens), settings, device, report)
                samples = [write(trained, vocabulary, prompt, options.sample) for prompt in PROMPTS]
                runs.append((losses, digest(*trained.parameters()), samples))
    finally:
        torch.use_deterministic_algorithms(switch)
    return compare_runs(*runs)


def show_loss(progress: Progress, loss: float) -> None:
    """One more step on the bar."""
    progress.advance(f"loss {loss:.3f}")


def write(trained: model.LanguageModel, vocabulary: text.Vocabulary, prompt: str, count: int) -> str:
    """The prompt and what the model writes after it."""
    return prompt + vocabulary.decode(model.write(trained, vocabulary.encode(prompt), count, TEMPERATURE, seed=0))


def compare_runs(first: tuple, second: tuple) -> int:
    """Shows both runs side by side; returns how many of losses, weights and texts differ."""
    losses = list(zip(first[0], second[0], strict=True))
    print()
    table = Table(("step", ">6"), ("loss of run 1", ">19"), ("loss of run 2", ">19"), ("", "<6"))
    count = min(ROWS_OF_LOSSES, len(losses))
    for index in sorted({round(i * (len(losses) - 1) / max(1, count - 1)) for i in range(count)}):
        one, two = losses[index]
        table.row(index + 1, repr(one), repr(two), "same" if one == two else "DIFFER")
    for sample in second[2]:
        print(f"\n| {sample.strip()}".replace("\n", "\n| ").replace("\n| |", "\n|"))
    digests = [[digest(torch.tensor(run[0], dtype=torch.float64)), run[1]] for run in (first, second)]
    print()
    table = Table(("SHA-256 of", "<15"), ("run 1", "<16"), ("run 2", "<16"), ("", "<6"))
    differences = 0
    for name, one, two in zip(("all losses", "all weights"), *digests, strict=True):
        table.row(name, one[: verify.DIGITS], two[: verify.DIGITS], "same" if one == two else "DIFFER")
        differences += one != two
    if first[2] != second[2]:
        print("the texts of run 1 DIFFER:", *first[2], sep="\n")
        differences += 1
    if len(losses) > 1 and not losses[-1][1] < losses[0][1]:
        print("the loss did NOT fall")
        differences += 1
    return differences
