"""The PEP 517 build backend: setuptools', with NVIDIA's compiler as a requirement where it is wanted and missing."""

from __future__ import annotations

import cuda_toolkit
import toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _with_compiler(requirements: list[str]) -> list[str]:
    try:
        return [*requirements, *cuda_toolkit.required_wheels()]
    except toolchain.BuildError as error:
        raise SystemExit(f"fastlm: {error}") from None


def get_requires_for_build_wheel(config_settings=None):
    return _with_compiler(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_compiler(build_meta.get_requires_for_build_editable(config_settings))
