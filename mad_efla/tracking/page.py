"""MLflow's page: its server on a store, and the address of an experiment's charts."""

import contextlib
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
_EVERYWHERE = ("0.0.0.0", "::", "")  # listens on every address of the machine
_LOCAL_HOSTS = [  # whom MLflow's server answers by itself: this machine and private networks
    *("localhost", "127.0.0.1", "[::1]", "0.0.0.0", "localhost:*", "127.0.0.1:*", "[[]::1]:*", "0.0.0.0:*"),
    *("10.*", "192.168.*", *(f"172.{n}.*" for n in range(16, 32)), "fc00:*", "fd00:*"),
]


def ui(
    uri: str,
    out: Path,
    host: str,
    port: int | None,
    say: Callable[[str], object],
    *,
    allowed_hosts: tuple[str, ...] = (),
) -> None:
    """Open MLflow on a store; for a local one this process becomes its server.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders, mirrored first.
        host: Address to listen on.
        port: Port to listen on; None takes 5000 or the next free one.
        say: Prints a line for the user.
        allowed_hosts: Further names by which browsers may call the server, as `lab.example.org`.

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
    if report.problem and not report.experiments:
        raise ConfigError(report.problem)
    for line in (*report.notes, *filter(None, [report.problem])):  # what is there can be looked at all the same
        say(f"note: {line}")
    newest = [*report.experiments.values()][-1:]
    if is_server(uri):
        say(deep_link(uri, host, port or _PORT, *newest))
        return
    port = _free_port(host, port)
    names = [*allowed_hosts, *_own_names(host)]
    say(deep_link(uri, host, port, *newest))
    for name in [name for name in names if host in _EVERYWHERE and not name[0].isdigit()][:1]:
        say(f"from other machines: {deep_link(uri, name, port, *newest)}")
    say("(answers in about ten seconds; Ctrl-C ends it)")
    sys.stdout.flush()
    _become_server(uri, host, port, names)


def _become_server(uri: str, host: str, port: int, names: list[str]) -> None:
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(artifacts(uri))]
    command += ["--uvicorn-opts", "--log-level warning"]
    os.execve(sys.executable, command, _environment(uri, names, port))


def _environment(uri: str, names: list[str], port: int) -> dict[str, str]:
    """Return the server's environment; what the user has set in it stands.

    MLflow answers calls only under names that it was given, and its page's own requests only from
    addresses that it was given; by default it knows neither this machine's name nor the names in `names`.
    """
    hosts = [*_LOCAL_HOSTS, *(form for name in names for form in (name, f"{name}:{port}"))]
    origins = [f"{scheme}://{name}:{port}" for name in names for scheme in ("http", "https")]
    origins += [f"{scheme}://{name}" for name in names for scheme in ("http", "https")]
    ours = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(dict.fromkeys(hosts)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(dict.fromkeys(origins)),
        "PYTHONWARNINGS": "ignore",  # of its own dependencies
    }
    fixed = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument: it may hold a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return ours | os.environ | fixed


def _own_names(host: str) -> list[str]:
    """Return the names and addresses by which a server that listens on `host` is called."""
    if host not in _EVERYWHERE:
        return [_in_address(host)]
    names = [socket.getfqdn(), socket.gethostname()]
    with contextlib.suppress(OSError):
        names += [_in_address(str(found[4][0])) for found in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys(names))


def _in_address(host: str) -> str:
    """Write a host as addresses have it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def deep_link(uri: str, host: str, port: int, experiment_id: str | None = None) -> str:
    """Return the address of an experiment's charts: its cells, best first.

    Without it the page lists the sweeps, with their runs folded away.
    """
    shown = "127.0.0.1" if host in _EVERYWHERE else _in_address(host)
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
