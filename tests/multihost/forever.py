"""One of several hosts that never ends by itself.

    python -m tests.multihost.forever COORDINATOR HOSTS HOST CHECKPOINT [bare]

Says `running` once it has exchanged something with the others, and goes on with that.
"""

import sys
from pathlib import Path

import checkpoints
from astra_jax.cli.main import guarded
from astra_jax.hosts.options import Hosts
from astra_jax.hosts.runtime import open_mesh
from astra_jax.serving.compile import parallelize, shardings
from tests.multihost.one_host import inputs_for


def run() -> None:
    """Runs a model without end."""
    coordinator, hosts, host, path = sys.argv[1:5]
    mesh = open_mesh(None, Hosts(coordinator, int(hosts), int(host), start_seconds=20.0, patience=5.0))
    checkpoint = checkpoints.load(path, shardings=lambda model: shardings(model, mesh))
    program, inputs = parallelize(checkpoint.model, mesh), inputs_for(checkpoint)
    while True:
        program(inputs).block_until_ready()
        print("running", flush=True)
        if Path(path, f"fail-{host}").exists():
            raise RuntimeError("told to fail")


if __name__ == "__main__":
    # Bare, it fails as a program of a library's user would: nobody catches it.
    sys.exit(run() if "bare" in sys.argv else guarded(run))
