"""A process that has workers, and ends in some way; see ``tests/fault/test_near_exits.py``.

    python -m tests.support.near_owner FOLDER ENDING

It says on standard output what it knows, one JSON object per line.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from offload.tiers.near.disk import NearDisk
from offload.tiers.near.launching import Launcher
from offload.tiers.scratch import ScratchDir
from tests.support.near import SCALE, Held, check_attends, draw_query, fill, make_near, num_restarts

MANY_ROWS = 4000
"""So many take seconds."""


def say(**things: Any) -> None:
    print(json.dumps(things), flush=True)


def say_pids(disk: NearDisk) -> None:
    launcher = Launcher._shared
    assert launcher is not None
    say(launcher=launcher._process.pid, workers=[member.link.pid for member in disk.members])


def exit_amid(disk: NearDisk, held: Held) -> None:
    """Leave while workers attend."""
    rows = held.rows() * (MANY_ROWS // 2)
    call = disk.attend(draw_query().repeat(MANY_ROWS // 2, 1, 1), rows, SCALE)
    say(done=call.done())
    sys.exit(3)


def interrupt(disk: NearDisk, held: Held) -> None:
    """Outlive a fork's exit and a Ctrl-C, go on as if nothing was, and leave amid of something."""
    if not os.fork():
        sys.exit()
    os.wait()
    try:
        say_pids(disk)
        signal.pause()
    except KeyboardInterrupt:
        check_attends(disk, held)
        say(restarts=num_restarts(disk))
    exit_amid(disk, held)


def fork(disk: NearDisk, held: Held) -> None:
    """Wait to be killed; a child has all descriptors, too, and ends when its input does."""
    if not os.fork():
        say(fork=os.getpid())
        sys.stdin.read()
        os._exit(0)
    check_attends(disk, held)
    say_pids(disk)
    signal.pause()


def forget(folder: Path) -> None:
    """Use a folder that goes with the process, and leave while workers write to it."""
    disk = make_near(ScratchDir(folder).path, has_channels=True, block_tokens=64)
    held = fill(disk, num_chunks=16)
    say_pids(disk)
    infos = [info for row in held.infos for info in row]
    buffers = [buffer for row in held.buffers for buffer in row]
    say(done=disk.write(disk.allocate(len(infos), 5), infos, buffers).done())


def main(folder: Path, ending: str) -> None:
    torch.set_num_threads(1)
    if ending == "forget":
        forget(folder)
        return
    disk = make_near(folder, num_paths=2)
    held = fill(disk)
    {"interrupt": interrupt, "fork": fork}[ending](disk, held)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
