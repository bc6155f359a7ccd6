"""What says that data sets are those they were: for the index cache, whose folder it names, and for a run that goes on.

The engine knows a cached index by the names of the data sets. One that is written again under its old name would be
read by the old index: other documents, cut at the wrong places. So each blend gets a folder of its own, named by the
lengths of all sequences of its data sets; nothing else of the data enters the index.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_mixtral.data.datasets.blend import Blend, prefixes_of
from megatron_mixtral.data.datasets.instruction_files import IDS, LABELS
from megatron_mixtral.data.indexed import IndexFile

LOOKED_AT, BLOCK = 64, 4096  # places of a data set, spread evenly, and the bytes there that enter its identity


def cache_folder(given: str | None, prefixes: Iterable[str]) -> str | None:
    """The folder inside `given` (`--data-cache-path`; by default `FIRST_PREFIX_index_cache`); None without data sets.

    Raises `DataError` for a data set that is not whole.
    """
    prefixes = list(dict.fromkeys(prefixes))
    if not prefixes:
        return None
    digest = hashlib.sha256()
    for prefix in prefixes:
        index = IndexFile(prefix)
        digest.update(f"{prefix}\0{len(index)}\0".encode())
        digest.update(index.lengths)
    return str(Path(given or f"{prefixes[0]}_index_cache") / digest.hexdigest()[:16])


def identities(blends: Iterable[Blend | None], instruction: bool = False) -> dict[str, str]:
    """In words, by prefix, what each data set of some blends is: its tokens, and a digest of its lengths and of ids at
    `LOOKED_AT` places. A copy has the same; one that was written again with other contents has another, unless it has
    the same lengths and differs in few places only. Raises `DataError` for a data set that is not whole.
    """
    found = {}
    for prefix in prefixes_of(blends):
        indices = [IndexFile(prefix + ending) for ending in ((IDS, LABELS) if instruction else ("",))]
        digest = hashlib.sha256()
        for index in indices:
            digest.update(index.lengths)
            size = index.tokens * index.dtype.itemsize
            with open(index.prefix + ".bin", "rb") as stream:
                for place in range(LOOKED_AT):
                    stream.seek(max(size - BLOCK, 0) * place // (LOOKED_AT - 1))
                    digest.update(stream.read(BLOCK))
        found[prefix] = f"{indices[0].tokens} tokens, {digest.hexdigest()[:12]}"
    return found
