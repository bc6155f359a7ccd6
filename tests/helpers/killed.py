"""Run a program and kill it before its Nth change of the disk: `killed.py N FILE PROGRAM ARGS...`.

The program's whole process group ends by SIGKILL, its worker processes too. A number instead of a moment: it hits any
place of the program on any machine, however busy. With N = 0 the program comes to its end and FILE gets the number of
its changes. Workers that are forked go on counting from where they were forked.
"""

import itertools
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType

CHANGES = {"write", "writelines", "pwrite", "truncate", "ftruncate", "posix_fallocate", "copy_file_range", "fsync",
           "fdatasync", "rename", "replace", "remove", "unlink", "mkdir", "rmdir", "link"}  # fmt: skip


def of_files(function: object) -> bool:
    """Of the module os, or a method of an open file; not str.replace or list.remove."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, ModuleType):
        return owner.__name__ == "posix"
    file = type(owner).__name__ in ("FileIO", "BufferedWriter", "TextIOWrapper")
    return file and owner not in (sys.stdout, sys.stderr)


def main() -> None:
    number, counted, program = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    changes = itertools.count(1)

    def watch(frame: FrameType, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__name__", "") in CHANGES and of_files(function) \
                and next(changes) == number:
            os.killpg(0, signal.SIGKILL)

    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(program).resolve().parent))
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        sys.setprofile(None)
        counted.write_text(str(next(changes) - 1))


if __name__ == "__main__":
    main()
