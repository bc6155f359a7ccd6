"""torchrun as `runtime/launch.py` starts it: the same command line, an end without a traceback.

The ranks have said why they ended, and a signal is no fault; torchrun itself would add forty lines of its own to
either. Run as `python -m megatron_mixtral.runtime.torchrun`.
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logger = logging.getLogger(__name__)


def main() -> int:
    """Run torchrun with the process's arguments. The exit status: 0, 1 where a rank failed, 128 + a signal's number."""
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        logger.error("rank %d was the first to end, with %s", rank, how)
        return 1
    except SignalException as end:
        logger.info("ended by %s", signal.Signals(end.sigval).name)
        return 128 + end.sigval
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
