"""accelerate launch without the launcher's own traceback: the run's error stays the last line.

    python -m runtime.launch --config_file recipes/accelerate/fsdp2.yaml train_saei.py --config ...

The options are those of accelerate launch, and so is all it does, with two differences. Where a
process ends with the exit code of a fault (faults.py), this one ends with it too, and says nothing
more. With `--dry_run true` behind the script one process is started, in the environment of the
first of all: the plan for 8 GPUs needs none. One process needs no launcher: python train_saei.py
"""

import argparse
import logging
import os
import re
import subprocess
import sys

from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command,
    launch_command_parser,
)
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from runtime import faults


def main(argv: list[str]) -> None:
    """Launch. Exits with the code of a fault; raises what accelerate raises for other failures."""
    args = launch_command_parser().parse_args(argv)
    if re.search(r"--dry_run[ =]true", " ".join(args.training_script_args)):
        command = [sys.executable, args.training_script, *args.training_script_args]
        sys.exit(subprocess.run(command, env=environment(args), check=False).returncode)
    os.environ[faults.LAUNCHER] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:  # of one process
        code = error.returncode
        sys.exit(code if code > 0 else 128 - code)  # -9: killed by signal 9
    except ChildFailedError as error:
        said = []
        for failure in error.failures.values():
            # A dict is what faults.say left. The exit code may be another one: a process can abort
            # while it exits, when a thread of torch still waits for those that are gone.
            if isinstance(failure.message, dict):
                said.append(failure.message["message"])
        if not said:
            raise  # its table says how each process ended
        print(said[0], file=sys.stderr)
        sys.exit(faults.EXIT_CODE)


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What accelerate would tell the first of the processes, and how many there would be."""
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.main_process_port = 0  # any: it is not used
        args.deepspeed_fields_from_accelerate_config = ""
        _, found = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        found = prepare_multi_gpu_env(args)
    else:
        _, found = prepare_simple_launcher_cmd_env(args)
    return found | {"WORLD_SIZE": str(args.num_processes or 1)}


if __name__ == "__main__":
    main(sys.argv[1:])
