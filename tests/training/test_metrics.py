"""Loss and accuracy over scored positions."""

import pytest
import torch

from mad_efla.training.metrics import Tally


def test_token_and_macro_accuracy_differ_as_the_reference_does():
    tally = Tally(4, torch.device("cpu"))
    # Always answers 0; half of the targets are 0, the others 1 and 2; 3 never occurs.
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1
    tally.add(logits[:4], torch.tensor([0, 0, 1, 2]))
    tally.add(logits[4:], torch.tensor([0, 0, 1, 2]))
    scores = tally.scores()
    assert scores.token_accuracy == 0.5
    assert scores.macro_accuracy == pytest.approx(1 / 3)
    wanted = torch.tensor([0, 0, 1, 2] * 2)
    assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item())
