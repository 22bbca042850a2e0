"""Corruptions do exactly what they say, and draw what they draw whatever the severity."""

import numpy as np
import pytest

from mad_efla.tasks._corruptions import CORRUPTIONS, NEUTRAL, UPPER, corrupt

IMAGES = np.random.default_rng(1).random((400, 64), dtype=np.float32)


def under(name, severity, seed=0):
    return corrupt(name, IMAGES, severity, np.random.default_rng(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_neutral_severity_changes_no_bit(name):
    found = under(name, NEUTRAL.get(name, 0.0))
    assert found.dtype == np.float32
    assert found.tobytes() == IMAGES.tobytes()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_equal_streams_give_equal_bytes_and_others_do_not(name):
    severity = 2.0 if name == "shift" else 0.5
    assert np.array_equal(under(name, severity), under(name, severity))
    drawn = name not in ("intensity", "inversion")
    assert np.array_equal(under(name, severity), under(name, severity, seed=1)) == (not drawn)


def test_dropout_takes_the_share_it_says_and_keeps_the_rest():
    few, many = under("dropout", 0.2) == 0, under("dropout", 0.6) == 0
    assert abs(few.mean() - 0.2) < 0.01
    assert abs(many.mean() - 0.6) < 0.01
    assert (many | ~few).all()  # what is dropped at 0.2 is dropped at 0.6
    assert np.array_equal(under("dropout", 0.2)[~few], IMAGES[~few])
    assert not under("dropout", UPPER["dropout"]).any()


def test_intensity_and_inversion_are_what_they_say():
    assert np.array_equal(under("intensity", 10.0), np.float32(10) * IMAGES)
    assert np.allclose(under("inversion", 1.0), 1 - IMAGES)
    assert np.allclose(under("inversion", 0.5), 0.5)


def test_noise_has_its_standard_deviation_and_one_pattern():
    small, large = (under("noise", s).astype(np.float64) - IMAGES for s in (0.1, 0.4))
    assert abs(small.std() - 0.1) < 0.002
    assert abs(small.mean()) < 0.002
    assert np.allclose(4 * small, large, atol=1e-6)


def test_a_shift_moves_whole_images_to_each_side_alike():
    moved = under("shift", 2.0).reshape(-1, 8, 8)
    images = IMAGES.reshape(-1, 8, 8)
    sides = {
        "left": (moved[:, :, :6], images[:, :, 2:]),
        "right": (moved[:, :, 2:], images[:, :, :6]),
        "up": (moved[:, :6], images[:, 2:]),
        "down": (moved[:, 2:], images[:, :6]),
    }
    hits = np.stack([(a == b).all(axis=(1, 2)) for a, b in sides.values()])
    assert (hits.sum(axis=0) == 1).all()
    assert (hits.mean(axis=1) > 0.18).all()
    assert abs((moved == 0).mean() - 0.25) < 1e-9  # two of eight rows or columns
    assert not under("shift", 8.0).any()


def test_a_burst_is_one_run_of_white():
    hit = under("burst", 0.25) == 1
    assert (hit.sum(axis=1) == 16).all()
    for row in hit:
        first = row.argmax()
        assert row[first : first + 16].all()
    assert len({int(row.argmax()) for row in hit}) > 30
    assert (under("burst", 0.25)[~hit] == IMAGES[~hit]).all()
    assert (under("burst", 1.0) == 1).all()
