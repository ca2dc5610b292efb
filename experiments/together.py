"""Run one stage in N processes of this machine: `python experiments/together.py 2 search --budget 0.3`.

It is torchrun without the traceback that torchrun prints below the message of a stage that refuses its flags. The
processes are started once, and `run` keeps them for all its stages.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

HERE = "--standalone --local-addr 127.0.0.1 --nproc-per-node".split()


def main(count: str, *stage: str) -> int:
    """Run the stage; returns the exit status of the process that failed first, 128 + n after signal n."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on speed
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(parse_args([*HERE, count, "-m", "ftp_lightning", *stage]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"process {rank} was ended by {name}\nRun the same command again to resume.", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
