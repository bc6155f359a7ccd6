"""The engine's C++ helpers for datasets, which the wheel has compiled already."""

import importlib.util
from pathlib import Path

from megatron_mixtral.runtime.replacements import Fix, around


def _wheel_has_helpers_without_makefile() -> bool:
    """Whether the helper can be imported and cannot be compiled."""
    from megatron.core.datasets import utils

    return (importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
            and not (Path(utils.__file__).parent / "Makefile").exists())


FIX = Fix(
    name="dataset-helpers",
    symptom="training exits at start: 'Failed to compile the C++ dataset helper functions'",
    cause="megatron.training runs make in megatron/core/datasets; the wheel has the compiled helper, no Makefile",
    versions="0.19.2",
    remove_when="compile_helpers returns without make where helpers_cpp can be imported",
    needed=_wheel_has_helpers_without_makefile,
    apply=around("megatron.core.datasets.utils:compile_helpers", lambda compile_helpers: None),
)
