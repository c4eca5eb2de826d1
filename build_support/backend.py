"""The PEP 517 build backend: scikit-build-core, which asks for torch only where the target environment has none.

A static build requirement on torch would make pip's build isolation download a CUDA torch of several GB and build
against that one.
"""

from __future__ import annotations

from typing import Any

from find_torch import find_torch, requirement
from scikit_build_core import build as _core

build_editable = _core.build_editable
build_sdist = _core.build_sdist
build_wheel = _core.build_wheel
get_requires_for_build_sdist = _core.get_requires_for_build_sdist
prepare_metadata_for_build_editable = _core.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = _core.prepare_metadata_for_build_wheel


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_core.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_core.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    return [] if find_torch() else [requirement()]
