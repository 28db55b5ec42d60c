"""The native library, built by tools/build. Everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools.build import BuildError, build, from_environment, install


class BuildNative(build_ext):
    """Builds for FLASH_ATTENTION_BACKEND (see tools/build/config.py) and installs the library with its record."""

    def run(self) -> None:
        try:
            self.library, self.about = build(from_environment())
        except BuildError as error:
            sys.exit(f"error: {error}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        install(self.library, self.about, Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:  # an editable installation
        install(self.library, self.about, Path(__file__).resolve().parent / "flash_attn")


setup(
    ext_modules=[Extension("flash_attn._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one binary for every later Python
)
