"""Replicas of the daemon as an application of Ray Serve, with sessions that stay on their replica.

``serve run offload.daemon.ray_app:app config=offload.yaml replicas=2``, or the same in a config
file of Serve. See ``docs/ray.md``.
"""

from typing import TYPE_CHECKING, Final

from ray import serve
from ray.serve.config import RequestRouterConfig

from offload.daemon.replica import SAVE_S, Replica, ReplicaArguments

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp

NAME: Final = "Daemon"
"""Of the deployment, in config files of Serve."""

_ROUTER: Final = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_PROBES: Final = 16
"""Requests next to those that the engine has room for: health, lists of models, sessions."""

_STARTS: Final = 3
"""What is wrong with a configuration or a model does not mend itself."""


class DaemonReplica(Replica):
    """A replica, in the words of Ray Serve.

    Parameters
    ----------
    arguments : ReplicaArguments
    """

    def __init__(self, arguments: ReplicaArguments) -> None:
        super().__init__(arguments, serve.get_replica_context().world_size)

    async def __serve_build_asgi_app__(self) -> "ASGIApp":
        """Return what Serve's proxies send requests to."""
        return await self.start()

    async def __del__(self) -> None:
        """Save everything: Serve calls this when the running requests have ended."""
        await self.stop()


def app(arguments: ReplicaArguments) -> "Application":
    """Return the application that ``serve run`` and config files of Serve name.

    Parameters
    ----------
    arguments : ReplicaArguments
        Serve makes it of ``key=value``, or of ``args``.

    Raises
    ------
    ConfigError
        The configuration is wrong.
    """
    configuration = arguments.read()
    running, server = configuration.running, configuration.server
    options = {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus}
    deployment = serve.deployment(
        name=NAME,
        num_replicas=arguments.replicas,
        ray_actor_options=options,
        max_ongoing_requests=running.max_running + running.max_waiting + _PROBES,
        max_queued_requests=server.limits.connections,
        graceful_shutdown_timeout_s=server.drain_timeout + SAVE_S,
        max_constructor_retry_count=_STARTS,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment(serve.ingress()(DaemonReplica)).bind(arguments)
