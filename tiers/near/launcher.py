"""A process that has everything loaded and forks workers when it is asked to.

A worker that has to be replaced is there in milliseconds instead of seconds, and forking happens
where no threads run. Started by ``launching``; ends when its parent does.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import sys

from offload.tiers.near import worker

PID = struct.Struct("<q")


def main(control_fd: int) -> None:
    """Fork a worker for each message, which brings two descriptors, and answer with its pid.

    Parameters
    ----------
    control_fd : int
        Inherited: one end of a socket pair.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    control = socket.socket(fileno=control_fd)
    # A fork of the parent may hold the other end of the control socket open.
    parent = os.pidfd_open(os.getppid())
    worker.warm_up()
    while parent not in select.select([control_fd, parent], [], [])[0]:
        message, fds, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        pid = os.fork()
        if not pid:
            control.close()
            os.close(parent)
            _run(*fds)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(BrokenPipeError):
            control.send(PID.pack(pid))


def _run(connection_fd: int, memory_fd: int) -> None:
    try:
        worker.main(connection_fd, memory_fd)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
