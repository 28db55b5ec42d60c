"""The build: what it reads, what it generates, and the checks that CI runs. One test compiles a few kernels."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools/build").is_dir():
    pytest.skip("the build is tested in the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from tools import check_format, check_layering  # noqa: E402
from tools.build import (  # noqa: E402
    BuildError,
    build,
    config,
    cuda,
    hip,
    info,
    install,
    instances,
    ninja_file,
    rocm,
    torch_package,
)
from tools.check_spills import parse_ptxas  # noqa: E402


def make_config(**changes) -> config.Config:
    torch = torch_package.TorchPackage(Path("/nowhere/torch"), "2.13.0", "cpu", "")
    return replace(config.Config(backend="cpu", torch=torch), **changes)


def make_torch(folder: Path, version: str, cuda_version: str | None = None, hip: str | None = None) -> Path:
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "include/torch/csrc/stable/library.h").touch()
    lines = [f"__version__ = {version!r}", f"cuda: Optional[str] = {cuda_version!r}", f"hip: Optional[str] = {hip!r}"]
    (folder / "version.py").write_text("\n".join(lines))
    return folder


class TestTorchPackage:
    def test_reads_the_flavour(self, tmp_path):
        read = torch_package.read_torch
        assert read(make_torch(tmp_path / "a", "2.13.0+cpu")).flavour == "cpu"
        torch = read(make_torch(tmp_path / "b", "2.11.0+cu130", cuda_version="13.0"))
        assert (torch.flavour, torch.toolkit, torch.version) == ("cuda", "13.0", "2.11.0+cu130")
        assert read(make_torch(tmp_path / "c", "2.12.0", hip="7.1")).flavour == "hip"

    def test_refuses_an_old_one(self, tmp_path):
        folder = make_torch(tmp_path / "torch", "2.9.1")
        with pytest.raises(BuildError, match=r"at least 2\.10, got 2\.9\.1"):
            torch_package.find_torch({"FLASH_ATTENTION_TORCH": str(folder)})

    def test_says_where_it_looked(self, tmp_path):
        with pytest.raises(BuildError, match=re.escape(str(tmp_path))):
            torch_package.find_torch({"FLASH_ATTENTION_TORCH": str(tmp_path)})

    def test_finds_torch_without_site_packages(self):
        """As in pip's isolated build: the interpreter is the environment's, its packages are hidden."""
        found = torch_package.find_torch({})
        code = "import tools.build.torch_package as t; print(t.find_torch().folder)"
        command = [sys.executable, "-S", "-c", code]
        environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
        if sys.prefix != sys.base_prefix:
            environment["VIRTUAL_ENV"] = sys.prefix  # -S hides that, too
        hidden = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert hidden.returncode == 0, hidden.stderr
        assert Path(hidden.stdout.strip()).resolve() == found.folder.resolve()


class TestConfig:
    def test_subset(self):
        assert config.parse_subset("bf16:64,128; fp32:64") == {"bf16": (64, 128), "fp32": (64,)}
        assert config.parse_subset("") == {}

    @pytest.mark.parametrize("text", ["bf16", "int8:64", "bf16:x", "bf16:", "bf16:64;;fp32"])
    def test_refuses_a_malformed_subset(self, text):
        with pytest.raises(BuildError, match="FLASH_ATTENTION_INSTANCES"):
            config.parse_subset(text)

    @pytest.mark.parametrize(
        ("variable", "value"),
        [("FLASH_ATTENTION_BACKEND", "tpu"), ("FLASH_ATTENTION_INTERNAL_USE_RTZ", "yes"), ("MAX_JOBS", "0")],
    )
    def test_refuses_nonsense(self, tmp_path, variable, value):
        torch = make_torch(tmp_path / "torch", "2.13.0")
        environment = {"FLASH_ATTENTION_BACKEND": "cpu", "FLASH_ATTENTION_TORCH": str(torch), variable: value}
        with pytest.raises(BuildError, match=variable):
            config.from_environment(environment)

    def test_auto_follows_torch(self, tmp_path):
        torch = make_torch(tmp_path / "torch", "2.13.0")
        assert config.from_environment({"FLASH_ATTENTION_TORCH": str(torch)}).backend == "cpu"

    def test_auto_without_a_compiler(self, tmp_path, monkeypatch, capsys):
        """A GPU torch and no nvcc: the CPU, and saying so, or an error where there is a GPU to be used."""
        torch = torch_package.read_torch(make_torch(tmp_path / "torch", "2.13.0+cu130", cuda_version="13.0"))
        monkeypatch.setattr(cuda, "compiler_path", lambda environment: None)
        monkeypatch.setattr(config, "gpu_is_present", lambda flavour: False)
        assert config.choose_backend(torch, {}) == "cpu"
        assert "building for cpu" in capsys.readouterr().out
        monkeypatch.setattr(config, "gpu_is_present", lambda flavour: True)
        with pytest.raises(BuildError, match="FLASH_ATTENTION_BACKEND=cpu"):
            config.choose_backend(torch, {})

    def test_archs(self):
        assert cuda.cuda_archs(make_config()) == cuda.DEFAULT_ARCHS
        assert cuda.cuda_archs(make_config(archs=("9.0", "sm_86", "x86-64-v3"))) == ("90", "86")
        with pytest.raises(BuildError, match="80 or later"):
            cuda.cuda_archs(make_config(archs=("75",)))
        levels = instances.machines(make_config(archs=("80", "x86-64-v3")), "cpu", "x86_64")
        assert [machine.name for machine in levels] == ["x86-64-v3"]
        with pytest.raises(BuildError, match="x86-64-v9"):
            instances.machines(make_config(archs=("x86-64-v9",)), "cpu", "x86_64")

    def test_arm_gets_generic_code_only(self):
        assert [machine.name for machine in instances.machines(make_config(), "cpu", "aarch64")] == ["generic"]


def make_program(path: Path, output: str, code: int = 0) -> None:
    """A program that prints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n")
    path.chmod(0o755)


class TestRocm:
    def test_what_is_asked_for_wins(self, tmp_path):
        environment = {"PYTORCH_ROCM_ARCH": "gfx1100", "PATH": str(tmp_path)}
        asked = ("gfx90a", "generic")
        assert rocm.choose_archs(asked, environment) == (("gfx90a",), "FLASH_ATTENTION_ARCHS")

    @pytest.mark.parametrize("text", ["gfx908;gfx90a;gfx1100", "gfx908 gfx90a:xnack-", "gfx90a,gfx1030"])
    def test_then_torch_s_own(self, tmp_path, text):
        """ROCm's images set it to every GPU that their torch is for."""
        environment = {"PYTORCH_ROCM_ARCH": text, "ROCM_HOME": str(tmp_path)}
        assert rocm.choose_archs((), environment) == (("gfx90a",), "PYTORCH_ROCM_ARCH")

    def test_then_the_gpus(self, tmp_path):
        make_program(tmp_path / "bin/rocm_agent_enumerator", "gfx000\ngfx90a\ngfx90a\ngfx9-generic")
        assert rocm.gpus_present({"ROCM_HOME": str(tmp_path)}) == ("gfx90a",)
        assert rocm.choose_archs(("generic",), {"ROCM_HOME": str(tmp_path)}) == (("gfx90a",), "the GPUs here")

    def test_rocminfo_where_the_enumerator_fails(self, tmp_path):
        make_program(tmp_path / "bin/rocm_agent_enumerator", "gfx1100", code=1)
        make_program(
            tmp_path / "bin/rocminfo", "  Name:  AMD EPYC\n  Name:  gfx90a\n  amdgcn-amd-amdhsa--gfx90a:xnack-"
        )
        assert rocm.gpus_present({"ROCM_HOME": str(tmp_path)}) == ("gfx90a",)

    @pytest.mark.parametrize("programs", [{}, {"rocm_agent_enumerator": "gfx000"}, {"rocminfo": "ROCk is NOT loaded"}])
    def test_a_container_builds_without_a_gpu(self, tmp_path, programs):
        for name, output in programs.items():
            make_program(tmp_path / "bin" / name, output)
        assert rocm.choose_archs((), {"ROCM_HOME": str(tmp_path)}) == (("gfx90a",), "the default")

    def test_a_gpu_without_kernels(self, tmp_path):
        make_program(tmp_path / "bin/rocminfo", "Name: gfx1100")
        with pytest.raises(BuildError, match=r"the GPUs here: gfx1100, but there are kernels for .*gfx90a"):
            rocm.choose_archs((), {"ROCM_HOME": str(tmp_path)})
        with pytest.raises(BuildError, match="PYTORCH_ROCM_ARCH: gfx1030"):
            rocm.choose_archs((), {"ROCM_HOME": str(tmp_path), "PYTORCH_ROCM_ARCH": "gfx1030"})

    def test_programs_are_found(self, tmp_path):
        make_program(tmp_path / "home/bin/hipcc", "")
        make_program(tmp_path / "path/hipcc", "")
        home, path = str(tmp_path / "home"), str(tmp_path / "path")
        assert rocm.compiler_path({"ROCM_HOME": home, "PATH": path}) == f"{home}/bin/hipcc"
        assert rocm.compiler_path({"ROCM_PATH": home, "PATH": path}) == f"{home}/bin/hipcc"
        assert rocm.compiler_path({"ROCM_PATH": "/nowhere", "PATH": path}) == f"{path}/hipcc"
        assert rocm.compiler_path({"ROCM_HOME": "/nowhere", "PATH": path}) is None

    def test_auto_follows_a_rocm_torch(self, tmp_path):
        make_program(tmp_path / "rocm/bin/hipcc", "HIP version: 7.2.1")
        torch = make_torch(tmp_path / "torch", "2.10.0+rocm7.2.4", hip="7.2.53211")
        found = config.from_environment({"FLASH_ATTENTION_TORCH": str(torch), "ROCM_HOME": str(tmp_path / "rocm")})
        assert (found.backend, found.use_rtz) == ("hip", True)

    @pytest.mark.parametrize(
        ("flavour", "toolkit", "note"),
        [
            ("hip", "7.2.53211", None),
            ("hip", "6.4.43484", "hipcc is of HIP 7, .* of HIP 6"),
            ("cpu", "", "not for AMD"),
        ],
    )
    def test_says_what_does_not_fit(self, tmp_path, monkeypatch, flavour, toolkit, note):
        make_program(tmp_path / "bin/hipcc", "HIP version: 7.2.1")
        monkeypatch.setenv("ROCM_HOME", str(tmp_path))
        torch = torch_package.TorchPackage(tmp_path, "2.13.0", flavour, toolkit)
        notes = hip.HipBackend(make_config(backend="hip", archs=("gfx90a",), torch=torch)).notes()
        assert len(notes) == (note is not None) and (note is None or re.search(note, notes[0]))

    def test_torch_s_copy_of_the_runtime_is_linked(self, tmp_path):
        """Two copies in one process would not know each other's streams."""
        hipcc, torch = tmp_path / "rocm/bin/hipcc", tmp_path / "torch/lib"
        for path in (hipcc, tmp_path / "rocm/lib/libamdhip64.so", torch / "libc10.so"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        flags = rocm.runtime_flags(rocm.runtime_folders(str(hipcc), torch))
        assert flags == (f"-L{tmp_path}/rocm/lib", "-l:libamdhip64.so")
        (torch / "libamdhip64.so.7").touch()
        assert rocm.runtime_flags(rocm.runtime_folders(str(hipcc), torch)) == (f"-L{torch}", "-l:libamdhip64.so.7")
        assert rocm.runtime_flags(iter(())) == ("-lamdhip64",)


class TestInstances:
    def test_budget(self):
        for machine in instances.MACHINES:
            assert 0 < len(list(instances.instances(machine, make_config()))) <= instances.MAX_INSTANCES_OF_A_MACHINE

    def test_symbols_are_unique(self):
        rows = [row for machine in instances.MACHINES for row in instances.instances(machine, make_config())]
        assert len({row.symbol for row in rows}) == len(rows)
        assert all(row.symbol.isidentifier() and row.symbol.startswith("flash_attn_") for row in rows)

    def test_files_hold_every_instance_once(self):
        for machine in instances.MACHINES:
            files = instances.instance_files(machine, make_config())
            held = [row for file in files for row in file.instances]
            assert sorted(row.symbol for row in held) == sorted(
                row.symbol for row in instances.instances(machine, make_config())
            )
            assert len({file.name for file in files}) == len(files)

    def test_a_file_names_one_arch(self):
        for machine in instances.MACHINES:
            for file in instances.instance_files(machine, make_config()):
                others = {other.header for other in instances.MACHINES} - {machine.header}
                assert machine.header in file.text and not any(header in file.text for header in others)

    def test_float64_is_the_hosts(self):
        assert {machine.backend for machine in instances.MACHINES if "fp64" in machine.dtypes} == {"cpu"}

    def test_every_processor_runs_every_dtype(self):
        for processor in ("x86_64", "aarch64"):
            (generic,) = (m for m in instances.machines(make_config(), "cpu", processor) if m.name == "generic")
            assert generic.dtypes == config.DTYPES and generic.head_dims[-1] == 256 and not generic.flags

    def test_subset(self):
        small = make_config(subset={"bf16": (64,)})
        machine = instances.MACHINES[0]
        rows = list(instances.instances(machine, small))
        assert {row.family.name for row in rows} == {family.name for family in instances.FAMILIES}
        assert all(row.dtype == "bf16" and row.head_dim in (0, 64) for row in rows)

    def test_performance_mode(self):
        """Its instances: the 16-bit ones of what multiplies, where the mode changes anything, and only if wanted."""
        without = make_config(use_rtz=False)
        for machine in instances.MACHINES:
            all_rows, plain = (list(instances.instances(machine, chosen)) for chosen in (make_config(), without))
            rows = [row for row in all_rows if row.performance]
            assert [row for row in all_rows if not row.performance] == plain
            assert bool(rows) == machine.has_performance_mode == (machine.backend != "cuda")
            sizes = set(machine.head_dims) if rows else set()
            for family in instances.FAMILIES:
                for dtype in family.performance:
                    chosen = [row for row in rows if (row.family, row.dtype) == (family, dtype)]
                    assert {row.head_dim for row in chosen} == sizes
                    assert not family.by_modified or {row.head_dim for row in chosen if row.modified} == sizes
            assert {row.dtype for row in rows} <= {"fp16", "bf16"}
            assert all("PerformanceMode<" in row.template for row in rows)

    def test_loops_of_a_machine_s_own(self):
        """They do what modified instances do, on sizes that have these too."""
        for machine in instances.MACHINES:
            rows = list(instances.instances(machine, make_config()))
            scored = [row for row in rows if row.scored]
            assert {(row.family.name, row.head_dim) for row in scored} == {
                (name, size) for name, sizes in machine.scored for size in sizes
            }
            assert all(row.modified and replace(row, scored="") in rows for row in scored)

    def test_families_are_the_registry_s(self):
        header = (ROOT / "csrc/core/registry.h").read_text()
        match = re.search(r"enum class KernelKind[^{]*\{([^}]*)\}", header)
        assert match is not None
        assert set(re.findall(r"k(\w+)", match.group(1))) == {family.name for family in instances.FAMILIES}
        assert all((ROOT / "csrc" / family.header).exists() for family in instances.FAMILIES)


class TestNinja:
    def test_escapes(self):
        assert ninja_file.escape("a b:c$") == "a$ b$:c$$"
        assert ninja_file.quote("-DX=a b") == "'-DX=a b'"

    def test_an_unchanged_file_is_left_alone(self, tmp_path):
        path = tmp_path / "folder/file"
        ninja_file.write_if_changed(path, "text")
        os.utime(path, (1, 1))
        ninja_file.write_if_changed(path, "text")
        assert path.stat().st_mtime == 1
        ninja_file.write_if_changed(path, "other")
        assert path.read_text() == "other" and path.stat().st_mtime != 1

    def test_runs_and_reports_failure(self, tmp_path):
        rules = {"copy": ninja_file.Rule("cp $in $out", "copy $out"), "fail": ninja_file.Rule("false", "fail $out")}
        (tmp_path / "a b").write_text("content")
        good = ninja_file.Step("copy", (Path("a b"),), Path("c"))
        bad = ninja_file.Step("fail", (Path("a b"),), Path("d"))
        (tmp_path / "build.ninja").write_text(ninja_file.render(rules, [good, bad], Path("c")))
        ninja_file.run(tmp_path, 1)
        assert (tmp_path / "c").read_text() == "content"
        with pytest.raises(BuildError, match="a compiler failed"):
            ninja_file.run(tmp_path, 1, ["d"])


class TestInfo:
    def test_digest_follows_the_sources(self, tmp_path):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc/a.h").write_text("1")
        first = info.source_digest(tmp_path)
        assert info.source_digest(tmp_path) == first
        (tmp_path / "csrc/a.h").write_text("2")
        assert info.source_digest(tmp_path) != first

    def test_both_records_hold_the_same(self):
        about = {"version": '2"\\', "rtz": False, "archs": {"cpu": ["generic"]}}
        literal = re.search(r"kBuildInfo = (.*);", info.cpp_source(about))
        assert literal is not None and json.loads(ast.literal_eval(literal.group(1))) == about
        module: dict[str, object] = {}
        exec(info.python_source(about), module)
        assert module["BUILD_INFO"] == about


class TestLayering:
    def test_the_house_is_in_order(self):
        assert check_layering.violations(ROOT / "csrc") == []

    @pytest.mark.parametrize(
        ("path", "text", "complaint"),
        [
            ("core/x.h", '#include "../backend.h"\n', "core may not include"),
            ("core/x.h", "#include <torch/csrc/stable/tensor.h>\n", "torch"),
            ("cuda/kernels/x.cuh", '#include "../sm80/arch.cuh"\n', "cuda/kernels may not include"),
            ("cuda/sm80/arch.cuh", '#include "cuda/attention/mask.cuh"\n', "cuda/sm80 may not include"),
            ("cuda/tile/x.cuh", "#include <cuda_runtime.h>\n", "vendor"),
            ("cuda/tile/x.cuh", "#if defined(__CUDA_ARCH__)\n#endif\n", "outside compat.cuh"),
            ("elsewhere/x.h", "", "in no layer"),
            ("core/x.h", '#include "missing.h"\n', "unknown"),
        ],
    )
    def test_sees_a_violation(self, tmp_path, path, text, complaint):
        for name in ("backend.h", "cuda/sm80/arch.cuh", "cuda/attention/mask.cuh"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        found = check_layering.violations(tmp_path)
        assert len(found) == 1 and complaint in found[0]


class TestFormat:
    @pytest.mark.parametrize("text", ["caf\u00e9\n", "\tx\n", "x \n", "x", "x\n\n", "x" * 121 + "\n"])
    def test_sees_a_fault(self, text):
        assert len(list(check_format.problems("x.h", text))) == 1

    def test_passes_good_text(self):
        assert list(check_format.problems("x.h", "int x;\n")) == []


class TestSpills:
    REPORT = """ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers
"""

    def test_reads_ptxas(self):
        first, second = parse_ptxas(self.REPORT)
        assert first.spills and (first.entry, first.arch, first.registers) == ("first", "sm_80", 255)
        assert not second.spills and second.registers == 64

    def test_refuses_a_report_without_figures(self):
        with pytest.raises(ValueError, match="no figures"):
            parse_ptxas("Compiling entry function 'first' for 'sm_80'\n")


class TestBinary:
    """What the build left behind."""

    def level_objects(self) -> list[Path]:
        levels = [machine.name for machine in instances.MACHINES if machine.backend == "cpu"]
        return [path for level in levels for path in (ROOT / "build").glob(f"native-*/obj/{level}/*.o")]

    def test_levels_of_the_host_share_no_symbol(self):
        """A global or weak function would let the linker run AVX-512 code on a processor without it."""
        objects = self.level_objects()
        if not objects:
            pytest.skip("no build folder beside this installation")
        for path in objects:
            listing = subprocess.run(["nm", "-g", "--defined-only", path], capture_output=True, text=True, check=True)
            symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
            assert symbols and all(symbol.startswith("flash_attn_") for symbol in symbols), path

    def test_records_agree(self):
        torch = pytest.importorskip("torch")
        import flash_attn._build_info as record  # type: ignore[import-not-found]
        import flash_attn._library as library

        library.require()
        assert json.loads(torch.ops.flash_attn.build_info()) == record.BUILD_INFO
        assert record.BUILD_INFO["version"] == info.package_version(ROOT)

    def test_without_the_performance_mode(self, tmp_path):
        """FLASH_ATTENTION_INTERNAL_USE_RTZ=0: the build says so, and 16-bit calls in the mode raise."""

        class Elsewhere(config.Config):
            folder = tmp_path / "build"

        subset = {"fp16": (64,), "bf16": (64,), "fp32": (64,)}
        made = Elsewhere("cpu", torch_package.find_torch(), ("generic",), subset, use_rtz=False, jobs=2)
        package = tmp_path / "flash_attn"
        shutil.copytree(ROOT / "flash_attn", package, ignore=shutil.ignore_patterns("_C.*", "_build_info.py"))
        install(*build(made), package)
        script = tmp_path / "script.py"
        script.write_text(self.WITHOUT_RTZ)
        environment = {**os.environ, "FLASH_ATTENTION_INTERNAL_PERFORMANCE_MODE": "1"}
        result = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "left out" in result.stdout

    WITHOUT_RTZ = """
import os, torch
from flash_attn import flash_attn_func
from flash_attn.__main__ import main

for dtype in (torch.float16, torch.bfloat16):
    x = torch.randn(1, 5, 2, 64).to(dtype).requires_grad_()
    try:
        flash_attn_func(x, x, x)
    except ValueError as error:
        assert "USE_RTZ=1" in str(error) and "PERFORMANCE_MODE" in str(error), error
    else:
        raise SystemExit("nothing was raised")
    os.environ["FLASH_ATTENTION_INTERNAL_PERFORMANCE_MODE"] = "0"
    out = flash_attn_func(x, x, x)
    out.sum().backward()
    os.environ["FLASH_ATTENTION_INTERNAL_PERFORMANCE_MODE"] = "1"
x = torch.randn(1, 5, 2, 64)
assert flash_attn_func(x, x, x).isfinite().all()
main(["info"])
"""

    def test_wheel(self, tmp_path):
        """`pip wheel`, without isolation, of what is already compiled."""
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", tmp_path]
        environment = {**os.environ, "FLASH_ATTENTION_BACKEND": built_backend()}
        result = subprocess.run([*command, ROOT], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (wheel,) = tmp_path.glob("*.whl")
        assert re.fullmatch(r"flash_attn-2\.8\.3\.post\d+-cp310-abi3-linux_\w+\.whl", wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            text = {Path(name).name: archive.read(name).decode() for name in names if ".dist-info/" in name}
        assert {"flash_attn/_C.abi3.so", "flash_attn/_build_info.py", "flash_attn_2_cuda.py"} <= set(names)
        assert not [name for name in names if name.startswith(("csrc", "tools", "tests"))]
        assert text["top_level.txt"].split() == ["flash_attn", "flash_attn_2_cuda"]
        assert re.search(r"^Name: flash_attn$", text["METADATA"], re.MULTILINE)
        assert re.search(r"^Requires-Dist: torch>=2\.10$", text["METADATA"], re.MULTILINE)


def built_backend() -> str:
    """Of the library in the source tree, so that building a wheel finds everything compiled."""
    import flash_attn._build_info as record  # type: ignore[import-not-found]

    return record.BUILD_INFO["backends"][-1]
