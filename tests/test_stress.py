"""A few kills, as `make stress` makes fifty; and its count is held to what it claims to count."""

import sqlite3

import torch

from mad_efla.runs.folder import RunFolder
from mad_efla.runs.sweeps import read_sweeps
from tests.stress import _compare, stress


def test_kills_cost_nothing_and_the_count_would_see_it(tmp_path):
    count = stress(tmp_path, kills=3, runs=4, steps=300, seed=1)
    assert count[:5] == (4, 3, 0, 0, 0)

    (record,) = read_sweeps(tmp_path / "disturbed")
    first, second, third, fourth = (RunFolder(tmp_path / "disturbed", f) for f in record.fingerprints)
    with sqlite3.connect(tmp_path / "disturbed.db") as database:
        row = "(SELECT run_uuid FROM tags WHERE key = 'mad.fingerprint' AND value = ?)"
        database.execute(f"DELETE FROM metrics WHERE step = 20 AND run_uuid IN {row}", (first.fingerprint,))
        database.execute(
            "INSERT INTO metrics SELECT key, value, timestamp + 1, run_uuid, step, is_nan "
            f"FROM metrics WHERE step = 40 AND run_uuid IN {row}",
            (second.fingerprint,),
        )
    database.close()
    weights = third.load_model()
    weights[next(iter(weights))].view(-1)[0] += 1e-7
    third.save_model(weights)
    assert not torch.equal(*(next(iter(f.load_model().values())) for f in (third, fourth)))
    (fourth.path / "result.json").unlink()
    assert _compare(tmp_path) == (2, 1, 1)
