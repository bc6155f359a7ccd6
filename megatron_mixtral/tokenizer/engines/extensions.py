"""Our compiled modules, each built by `setup.py` from the C++ files of one folder; every one of them is optional.

`engines/native.py` and `records.py` load them. The module `_native_x` of a package comes from its folder `native_x`.
"""

import importlib
import zlib
from pathlib import Path
from types import ModuleType

import megatron_mixtral

BUILD = "python setup.py build_ext --inplace, or pip install again, where a C++ compiler is"


class ExtensionMissing(Exception):
    """The message says why there is no such module, and how to get one."""


def load_extension(module: str) -> ModuleType:
    """Raises `ExtensionMissing` where the module is not built, or was built from other sources than lie here."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ExtensionMissing(f"its extension is not built ({error}): {BUILD}") from error
    sources = sources_of(module)
    if sources.is_dir() and found.SOURCES != fingerprint(sources):
        raise ExtensionMissing(f"its extension was built from other sources than these: {BUILD}")
    return found


def sources_of(module: str) -> Path:
    """The folder of the C++ files, which only a checkout has."""
    *packages, name = module.split(".")
    return Path(megatron_mixtral.__file__).parent.joinpath(*packages[1:], name.removeprefix("_"))


def fingerprint(sources: Path) -> str:
    """A checksum of the C++ files, which `setup.py` compiles in as well, so that a stale build is noticed."""
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in files)):08x}"
