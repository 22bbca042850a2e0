"""MLflow's page: its server on a store, and the address of an experiment's charts."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from mad_efla.config import ConfigError
from mad_efla.runs.sweeps import read_sweeps
from mad_efla.tracking.bridge import sync
from mad_efla.tracking.records import PRIMARY
from mad_efla.tracking.stores import artifacts, is_server, sqlite_path, without_password

_PORT = 5000


def ui(uri: str, out: Path, host: str, port: int | None, say: Callable[[str], object]) -> None:
    """Open MLflow on a store; for a local one this process becomes its server.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders, mirrored first.
        host: Address to listen on.
        port: Port to listen on; None takes 5000 or the next free one.
        say: Prints a line for the user.

    Raises:
        ConfigError: There is no store, it cannot be used, or the port is taken.
    """
    path = sqlite_path(uri)
    if path and not path.exists() and not read_sweeps(out):
        raise ConfigError(
            f"{path}: no such store, and no sweep in {out}; run `mad-efla sweep` first, or name "
            "the store with --tracking-uri"
        )
    report = sync(uri, out)
    if report.problem:
        raise ConfigError(report.problem)
    newest = [*report.experiments.values()][-1:]
    if is_server(uri):
        say(deep_link(uri, host, port or _PORT, *newest))
        return
    port = _free_port(host, port)
    say(f"{deep_link(uri, host, port, *newest)}\n(answers in about ten seconds; Ctrl-C ends it)")
    sys.stdout.flush()
    environment = (
        {"MLFLOW_DISABLE_TELEMETRY": "true"}
        | os.environ
        | {
            "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument: it may hold a password
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),  # of its own dependencies
        }
    )
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(artifacts(uri))]
    command += ["--uvicorn-opts", "--log-level warning"]
    os.execve(sys.executable, command, environment)


def deep_link(uri: str, host: str, port: int, experiment_id: str | None = None) -> str:
    """Return the address of an experiment's charts: its cells, best first.

    Without it the page lists the sweeps, with their runs folded away.
    """
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    base = without_password(uri).rstrip("/") if is_server(uri) else f"http://{shown}:{port}"
    if experiment_id is None:
        return f"{base}/#/experiments?workflowType=machine_learning"
    where = quote("tags.`mad.role` = 'cell'")
    return (
        f"{base}/#/experiments/{experiment_id}/runs?searchFilter={where}"
        f"&orderByKey={quote(f'metrics.`{PRIMARY}`')}&orderByAsc=false"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


def _free_port(host: str, wish: int | None) -> int:
    for port in [wish] if wish else range(_PORT, _PORT + 50):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = error.strerror
                continue
        return port
    what = f"--port {wish}" if wish else f"ports {_PORT} to {_PORT + 49}"
    raise ConfigError(f"{what} on {host}: cannot be used ({reason}); choose another with --port")
