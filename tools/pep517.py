"""setuptools' build backend, which asks for the ninja package only where there is no ninja to use.

A second ninja of another version would also start the shared build folder over.
"""

import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def ninja_requirement() -> list[str]:
    return [] if shutil.which("ninja") or shutil.which("ninja-build") else ["ninja"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *ninja_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *ninja_requirement()]
