"""Where the index cache of a blend lies: a folder named by what the cache depends on.

The engine knows a cached index by the names of the data sets. One that is written again under its old name would be
read by the old index: other documents, cut at the wrong places. So each blend gets a folder of its own, named by the
lengths of all sequences of its data sets; nothing else of the data enters the index.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_mixtral.data.indexed import IndexFile


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
