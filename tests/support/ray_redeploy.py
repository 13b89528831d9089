"""Deploys the application anew on a Ray that runs: its replicas are replaced one by one.

Started as a module, with the arguments of the builder as JSON, under an interpreter with Ray.
"""

import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as ``offload serve --ray`` starts it

import ray
from ray import serve

from offload.daemon.ray_app import app
from offload.daemon.replica import ReplicaArguments

if __name__ == "__main__":
    del os.environ["RAY_ADDRESS"]
    ray.init(address="auto", configure_logging=False, log_to_driver=False)
    arguments = ReplicaArguments.model_validate_json(sys.argv[1])
    serve.run(app(arguments), name="offload", route_prefix="/")
