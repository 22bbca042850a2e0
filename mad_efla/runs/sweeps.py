"""The records of sweeps: which runs each is made of.

runs/sweeps/<id>.json    its record
runs/sweeps/<id>/        what was drawn of it
"""

from pathlib import Path

from mad_efla.runs.files import write_json
from mad_efla.runs.schema import SweepRecord


def write_sweep(out: Path, record: SweepRecord) -> None:
    """Write a sweep's record."""
    (out / "sweeps").mkdir(parents=True, exist_ok=True)
    write_json(out / "sweeps" / f"{record.id}.json", record.model_dump(mode="json"))


def sweep_figures(out: Path, identity: str) -> Path:
    """Say where figures of a sweep are, if any were drawn."""
    return out / "sweeps" / identity


def read_sweeps(out: Path, problems: list[str] | None = None) -> list[SweepRecord]:
    """Read the records of all sweeps under `out`, oldest first.

    Args:
        out: The folder of run folders.
        problems: Where to note which records cannot be read, and why; they are left out.
    """
    records = []
    for path in sorted((out / "sweeps").glob("*.json")):
        try:
            records.append(SweepRecord.model_validate_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "is no record of a sweep"
            if problems is not None:
                problems.append(f"{path}: {why}; its sweep command writes it again")
    return sorted(records, key=lambda r: (r.started, r.id))
