"""The C library's heap on a CPU machine: memory that a training step gives back stays with the process.

glibc hands blocks above its threshold (32 MiB at most) and the top of its heap back to the kernel when they are freed,
and the kernel clears new pages, four KiB at a time, when the next step asks for the same blocks again: 16,000 page
faults or more in a step of a small model, up to a tenth of its time. Kept, the blocks serve the next step. In turn the
process's resident memory stays at its peak, and that is higher: what lives on lies between freed blocks, which then do
not fit the next large one. docs/finetuning.md has figures of a run whose blocks are large. `cpu.enable()` calls it.
"""

import ctypes
import os
import platform

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
_CHOSEN_BY_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Whether freed memory now stays with this process: with glibc's heap, unless the environment arranges it itself.

    Blocks of tensors are also advised to take huge pages of 2 MiB, where no tensor of that size was made before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator when it first makes a large block
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Every block from the heap itself (none mapped for itself, which would be unmapped when freed), the heap never cut.
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
