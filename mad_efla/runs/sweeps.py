"""The records of sweeps: which runs each is made of.

runs/sweeps/<id>.json    its record
runs/sweeps/<id>/        what was drawn of it
"""

import contextlib
from pathlib import Path

from pydantic import ValidationError

from mad_efla.runs.files import write_json
from mad_efla.runs.schema import SweepRecord


def write_sweep(out: Path, record: SweepRecord) -> None:
    """Write a sweep's record."""
    (out / "sweeps").mkdir(parents=True, exist_ok=True)
    write_json(out / "sweeps" / f"{record.id}.json", record.model_dump(mode="json"))


def sweep_figures(out: Path, identity: str) -> Path:
    """Say where figures of a sweep are, if any were drawn."""
    return out / "sweeps" / identity


def read_sweeps(out: Path) -> list[SweepRecord]:
    """Read the records of all sweeps under `out`, oldest first; unreadable ones are left out."""
    records = []
    for path in (out / "sweeps").glob("*.json"):
        with contextlib.suppress(ValidationError, ValueError):
            records.append(SweepRecord.model_validate_json(path.read_bytes()))
    return sorted(records, key=lambda r: (r.started, r.id))
