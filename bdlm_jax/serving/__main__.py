"""python -m bdlm_jax.serving --workdir DIR [--arm domain] [--port 8000]: recommends over HTTP, from one arm of a run.

    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"user": "u0007", "k": 5}'

GET /health, POST /recommend {"user" or "history", "k"}, POST /batch {"users" or "histories", "k"}. It asks nobody who
they are and encrypts nothing: what faces the world stands behind a server that does.
"""

import argparse
import socket
import sys
from collections.abc import Sequence

from bdlm_jax.serving import artefact, index, scores
from bdlm_jax.types import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.serving", description="Serves a finished run over HTTP.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--arm", default="", help="domain or lm of BDLM, or another model of the run (default: domain)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="the port to listen at (default 8000)")
    parser.add_argument(
        "--index", type=int, nargs="?", const=index.SEARCHED, metavar="N",
        help=f"look through one in N parts of the items (default {index.SEARCHED}; extra index: faiss)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        listener = _listen(given.host, given.port)
        serve(given.workdir, given.arm, listener, one_in=given.index)
    except InputError as error:
        print(f"bdlm_jax: {error}", file=sys.stderr)
        return 2
    return 0


def serve(workdir: str, arm: str, listener: socket.socket, *, one_in: int | None = None) -> None:
    """Loads an arm, answers one request to itself, so that all is compiled, and serves until it is stopped."""
    try:
        import uvicorn

        from bdlm_jax.serving.http import make_app
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is missing: pip install "bdlm_jax[http]".') from None
    name = artefact.find_arm(workdir, arm)
    catalogue, loaded = artefact.load_catalogue(workdir), artefact.load_arm(workdir, name)
    if one_in is not None:
        loaded = index.with_index(loaded, one_in=one_in)
        print(f"bdlm_jax: {index.describe_index(loaded)}", file=sys.stderr)
    scores.arm_scores(loaded, [catalogue.history(0)], users=[0])
    app = make_app(catalogue, loaded, name=name)
    uvicorn.Server(uvicorn.Config(app, log_level="info", limit_concurrency=256)).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {host}:{port} ({error}): give another --host or --port.") from None


if __name__ == "__main__":
    sys.exit(main())
