"""The host: always built. Compiled once for every level of the instruction set, chosen when the library is used."""

import platform

from tools.build.backend import CXX_FLAGS, Backend, first_line
from tools.build.config import Config
from tools.build.instances import Instance, Machine, instance_files, instances, machines, write_instance_files
from tools.build.ninja_file import Rule, Step

# The stable ABI of torch 2.10: the binary runs under every later torch.
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
# A unique symbol cannot be made local; g++ 12 takes its own _mm512_undefined_ps() for a mistake.
GCC_LEVEL_FLAGS = ("-fno-gnu-unique", "-Wno-maybe-uninitialized", "-Wno-uninitialized")


class CpuBackend(Backend):
    name = "cpu"

    def __init__(self, config: Config):
        super().__init__(config)
        self.machines = machines(config, "cpu", platform.machine())
        self.is_gcc = "clang" not in first_line(config.cxx, "--version")

    def rules(self) -> dict[str, Rule]:
        cxx = f"{self.config.cxx} -MMD -MF $out.d $flags -c $in -o $out"
        # An inline function that two levels both compile must not be merged into one: a processor without AVX-512 would
        # run the copy that has it. So all but the tables' own symbols become local to their object.
        localise = "objcopy --wildcard '--keep-global-symbol=flash_attn_*' -R .group $out"
        return {
            "cxx": Rule(cxx, "c++ $out", "$out.d"),
            "cxx_level": Rule(f"{cxx} && {localise}", "c++ $out", "$out.d"),
        }

    def steps(self) -> list[Step]:
        csrc, torch = self.csrc, self.config.torch
        includes = (f"-I{csrc}", "-isystem", str(torch.include))
        plain: tuple[str, ...] = (*CXX_FLAGS, *includes, *TORCH_FLAGS, "-pthread")
        if self.config.backend != "cpu":
            plain = (*plain, "-DFLASH_ATTENTION_GPU=1")
        sources = [path for folder in ("core", "binding", "cpu") for path in sorted((csrc / folder).glob("*.cpp"))]
        steps = [Step("cxx", (path,), self.object_path(path.parent.name, path), plain) for path in sources]
        for machine in self.machines:
            # sqrt, log2 ... may be vectorised.
            flags: tuple[str, ...] = (*CXX_FLAGS, f"-I{csrc}", "-fno-math-errno", "-fno-trapping-math", *machine.flags)
            flags = (*flags, f"-DFA_ISA={machine.identifier}", *(GCC_LEVEL_FLAGS if self.is_gcc else ()))
            files = instance_files(machine, self.config)
            for path in write_instance_files(files, self.generated, ".cpp"):
                steps.append(Step("cxx_level", (path,), self.object_path(machine.name, path), flags))
        return steps

    def tables(self) -> dict[Machine, tuple[Instance, ...]]:
        return {machine: tuple(instances(machine, self.config)) for machine in self.machines}

    def link_flags(self) -> tuple[str, ...]:
        return ("-pthread",)

    def describe(self) -> dict[str, object]:
        return {
            "archs": [machine.name for machine in self.machines],
            "compiler": first_line(self.config.cxx, "--version"),
        }
