"""What can go wrong between us and MLflow, and what it means in a sentence with its cure.

A failure costs only itself. Which it costs depends on its kind:

    refusal     MLflow does not take this item (a name, a value, a deleted run): it is noted, the rest goes on
    away        no answer, or an error of the server's own: nothing more is sent now, and all of it later
    denial      credentials, rights, address: waiting does not help, so it is said before training
"""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mad_efla.tracking.stores import Problem, damaged, is_server, sqlite_path, without_password

_REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
_DENIALS = {
    401: "does not accept the credentials (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    403: "does not let this account write (403): ask for the right to edit experiments, or name another store with "
    "--tracking-uri",
    404: "is no MLflow (404: nothing is at this address): check host and path of --tracking-uri",
}
_FOREIGN_HOST = (
    "does not accept its own host name (403): start it with `mlflow server --allowed-hosts NAME`, or name it in "
    "--tracking-uri as it knows itself"
)
_AWAY = {429: "asks for fewer requests (429)", 408: "does not answer in time (408)", 425: "is not ready yet (425)"}


class Late(Exception):
    """The time is over, or another process has the store."""


class Meaning(NamedTuple):
    """What an error means.

    Attributes:
        sentence: In words, with the cure where there is one.
        passing: Whether it may be over later without anybody's doing.
    """

    sentence: str
    passing: bool


def in_time(deadline: float) -> None:
    """Let the caller go on until a time of the monotonic clock.

    Raises:
        Late: It is over.
    """
    if time.monotonic() > deadline:
        raise Late


def within(seconds: float, call: Callable[[], object]) -> None:
    """Make a call that may hang, and wait for it no longer than some seconds.

    Raises:
        TimeoutError: It has not come back; it is left to itself.
    """
    raised: list[BaseException] = []

    def made() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=made, name="mlflow-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]


def is_refusal(error: Exception) -> bool:
    """Say whether MLflow has looked at an item and does not take it; it would take others."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in _REFUSALS


def reason(error: BaseException, run_id: str = "", length: int = 200) -> str:
    """Return the first line of an error, fit to be shown, and the same for every run."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"^[A-Z_]+: ", "", text)  # MLflow's own code of the error
    text = text.replace(run_id, "...") if run_id else text
    kind = "" if "mlflow" in type(error).__module__ and text else type(error).__name__
    return without_password(": ".join(filter(None, (kind, text))))[:length]


def meaning(error: BaseException, uri: str) -> Meaning:
    """Put into words why MLflow is not up to date, and what helps."""
    where = f"MLflow at {without_password(uri)}"
    text = str(error)
    if isinstance(error, Problem):
        return Meaning(text, passing=False)
    if isinstance(error, Late):
        return Meaning(f"{where} is not up to date yet, the time was over", passing=True)
    if "malformed" in text or "not a database" in text:
        return Meaning(damaged(sqlite_path(uri) or without_password(uri)), passing=False)
    if sqlite_path(uri):
        return Meaning(f"{where}: {reason(error)}", passing=True)
    status = _http_status(error, uri)
    if status == 403 and "Invalid Host header" in text:
        return Meaning(f"{where} {_FOREIGN_HOST}", passing=False)
    if status in _DENIALS:
        return Meaning(f"{where} {_DENIALS[status]}", passing=False)
    if status in _AWAY:
        return Meaning(f"{where} {_AWAY[status]}", passing=True)
    if status >= 500:
        return Meaning(f"{where} fails with an error of its own ({status}): its log says why", passing=True)
    return _without_status(error, where)


def _without_status(error: BaseException, where: str) -> Meaning:
    """Put into words what is no HTTP status."""
    text = str(error)
    if "valid JSON format" in text or "Invalid url" in text:
        return Meaning(f"{where} is no MLflow (its answer is none of MLflow's): check --tracking-uri", passing=False)
    if re.search(r"Name or service not known|nodename nor servname|No address associated|NameResolution", text):
        return Meaning(f"{where} does not answer: its host name is not known here; check --tracking-uri", passing=True)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        cure = "name its authority's file in MLFLOW_TRACKING_SERVER_CERT_PATH"
        return Meaning(f"{where} has a certificate that is not trusted here; {cure}", passing=False)
    if isinstance(error, (TimeoutError, ConnectionError)) or "API request to" in text:
        return Meaning(f"{where} does not answer", passing=True)
    return Meaning(f"{where}: {reason(error)}", passing=type(error).__name__ == "RestException")


def _http_status(error: BaseException, uri: str) -> int:
    """Return the HTTP status that a server answered with; 0 where there was no answer, or another problem."""
    text = str(error)
    if found := re.search(r"failed with error code (\d{3})|too many (\d{3}) error responses", text):
        return int(found[1] or found[2])
    code = getattr(error, "error_code", None)
    if code in (None, *_REFUSALS) or "failed with" in text:
        return 0
    from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, RestException

    if code != "INTERNAL_ERROR":
        return ERROR_CODE_TO_HTTP_STATUS.get(str(code), 0)
    # JSON that is none of MLflow's, as of a proxy: MLflow forgets its status, so it is asked for again.
    return _ask(uri) if isinstance(error, RestException) and is_server(uri) else 0


def _ask(uri: str) -> int:
    try:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        endpoint = "/api/2.0/mlflow/experiments/search"
        answer = http_request(get_default_host_creds(uri), endpoint, "GET", params={"max_results": "1"})
        return 0 if answer is None or answer.status_code == 200 else int(answer.status_code)
    except Exception:  # whatever it is, it has been said as well as it can be
        return 0


def explain(sentence: str, out: Path) -> str:
    """Add to what is wrong that nothing is lost, and what brings it to MLflow."""
    return f"{sentence}; the runs are safe in {out}; `mad-efla sync` brings MLflow up to date later"
