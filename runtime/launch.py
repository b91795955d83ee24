"""accelerate launch without the launcher's own traceback: the run's error stays the last line.

    python -m runtime.launch --config_file recipes/accelerate/fsdp2.yaml train_saei.py --config ...

The options are those of accelerate launch, and so is all it does. Only where a process ends with
the exit code of a fault (faults.py), this one ends with it too, and says nothing more. One process
needs no launcher: python train_saei.py ...
"""

import logging
import os
import subprocess
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from runtime import faults


def main(argv: list[str]) -> None:
    """Launch. Exits with the code of a fault; raises what accelerate raises for other failures."""
    os.environ[faults.LAUNCHER] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except subprocess.CalledProcessError as error:  # of one process
        code = error.returncode
        sys.exit(code if code > 0 else 128 - code)  # -9: killed by signal 9
    except ChildFailedError as error:
        said = []
        for failure in error.failures.values():  # a message that faults.say left is a dict
            if failure.exitcode == faults.EXIT_CODE and isinstance(failure.message, dict):
                said.append(failure.message["message"])
        if not said:
            raise  # its table says how each process ended
        print(said[0], file=sys.stderr)
        sys.exit(faults.EXIT_CODE)


if __name__ == "__main__":
    main(sys.argv[1:])
