"""``offload serve --ray``: Ray Serve started, or joined, for as long as this process lives."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import ray
from ray import serve

from offload.daemon.ops.configuration import ServerSection
from offload.daemon.ops.logs import LOG, configure_logs
from offload.daemon.ray_app import app
from offload.daemon.replica import SAVE_S, ReplicaArguments
from offload.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

APPLICATION: Final = "offload"
_OBJECT_STORE_BYTES: Final = 512 << 20
"""Of Ray, for bodies of requests; Ray would take 30% of the memory, which tiers can use."""

_RELOAD_S: Final = 60.0
_EXIT_FORCED: Final = 130


def run_ray(arguments: ReplicaArguments, announce: Callable[[str], None]) -> int:
    """Serve until a signal says to stop, and end what was started here. Main thread only.

    Joins the cluster of ``RAY_ADDRESS``, if that is set; else starts one that only this machine
    reaches. SIGHUP has every replica read its configuration again. The first SIGTERM or SIGINT
    drains all replicas; the second ends this process at once.

    Parameters
    ----------
    arguments : ReplicaArguments
    announce : callable
        Told the address, once connections are taken.

    Returns
    -------
    int
        Exit status: 0 after an orderly end.

    Raises
    ------
    ConfigError
        The configuration is wrong, or the replicas cannot be started.
    """
    configuration = arguments.read()
    configure_logs(configuration.logging)
    application = app(arguments)
    with ExitStack() as held:
        held.enter_context(_ray(arguments))
        address = held.enter_context(_proxies(configuration.server))
        held.callback(serve.delete, APPLICATION)
        try:
            handle = serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ConfigError(f"the replicas did not start: {error}") from error
        told = _signals()
        LOG.info("serving", address=address, replicas=arguments.replicas, pid=os.getpid())
        announce(address)
        while told.get() == signal.SIGHUP:
            _reload(arguments, handle)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(_EXIT_FORCED))
        is_saved = _drain(arguments, handle)
    LOG.info("stopped", is_saved=is_saved)
    return 0 if is_saved else 1


@contextmanager
def _ray(arguments: ReplicaArguments) -> Iterator[None]:
    """Join the cluster that is named, or start one."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(configure_logging=False)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            configure_logging=False,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    try:
        if not os.environ.get("RAY_ADDRESS"):
            _refuse_too_little(arguments, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _refuse_too_little(arguments: ReplicaArguments, has: dict[str, float]) -> None:
    """Raise ConfigError where Ray would wait for ever for what this machine does not have."""
    for name, each in (("CPU", arguments.cpus), ("GPU", arguments.gpus)):
        wanted, found = arguments.replicas * each, has.get(name, 0.0)
        if wanted > found:
            raise ConfigError(
                f"{arguments.replicas} replicas of {each:g} {name} need {wanted:g}; Ray has "
                f"{found:g} here"
            )


@contextmanager
def _proxies(server: ServerSection) -> Iterator[str]:
    """Start Serve's proxies on the configured address, unless they run already; yield it."""
    has_serve = bool(serve.status().proxies)
    port = server.port or _free_port(server.host)
    if has_serve:
        LOG.warning("Serve runs already, and keeps its own address", asked=server.host, port=port)
    else:
        options = {"host": server.host.strip("[]"), "port": port}
        serve.start(proxy_location="EveryNode", http_options=options)
    try:
        yield f"http://{server.host}:{port}"
    finally:
        if not has_serve:
            serve.shutdown()


def _free_port(host: str) -> int:
    with socket.create_server((host.strip("[]"), 0)) as probe:
        return int(probe.getsockname()[1])


def _signals() -> "SimpleQueue[int]":
    """Return where the signals for this process arrive from now on."""
    told: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.put(number))
    return told


def _reload(arguments: ReplicaArguments, handle: "DeploymentHandle") -> None:
    """Have every replica read its configuration, unless it is seen to be wrong here."""
    try:
        configure_logs(arguments.read().logging)
        problems = _on_all(handle, "reload", _RELOAD_S)
    except (ConfigError, TimeoutError) as error:
        problems = [error]
    if any(problems):
        LOG.error("reload refused", reason="; ".join(str(each) for each in problems if each))
    else:
        LOG.info("reloaded", replicas=len(problems))


def _drain(arguments: ReplicaArguments, handle: "DeploymentHandle") -> bool:
    """Drain every replica, and return whether each has saved everything."""
    timeout_s = arguments.read().server.drain_timeout + SAVE_S
    try:
        answers = _on_all(handle, "drain", timeout_s)
    except TimeoutError as error:
        answers = [error]
    failed = [str(each) for each in answers if each is not True]
    if failed:
        LOG.error("not everything is saved", replicas=len(failed), reason="; ".join(failed))
    return not failed


def _on_all(handle: "DeploymentHandle", method: str, timeout_s: float) -> list[object]:
    """Return what each replica answers; the exception of one that has died amid it."""
    told = handle.broadcast(method)
    answers: list[object] = told.results(timeout_s=timeout_s, return_exceptions=True)
    return answers
