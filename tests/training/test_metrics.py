"""Loss and accuracy over scored positions."""

import pytest
import torch

from mad_efla.training.metrics import Tally


def test_token_and_macro_accuracy_differ_as_the_reference_does():
    tally = Tally(4, torch.device("cpu"))
    # Always answers 0; half of the targets are 0, the others 1 and 2; 3 never occurs.
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1
    for half in (logits[:4], logits[4:]):
        tally.add(half, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 3, 3]))
    scores = tally.scores()
    assert scores.token_accuracy == 0.5
    assert scores.macro_accuracy == pytest.approx(1 / 3)
    wanted = torch.tensor([0, 0, 1, 2] * 2)
    assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item())


def test_a_sequence_counts_if_all_its_answers_are_right():
    tally = Tally(3, torch.device("cpu"))
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 2, 0])]
    logits[4, 1] = torch.nan  # right, but not finite
    # Sequences 0, 1, 3 have answers, 2 has none; 0 is right, 1 is half right, 3 is not finite.
    tally.add(logits, torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 0, 1, 1, 3]))
    assert tally.sequences.tolist() == [1, 3]
    tally = Tally(3, torch.device("cpu"))
    tally.add(logits[:4], torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1, 1]))
    tally.add(logits[:1], torch.tensor([0]), torch.tensor([5]))
    assert tally.scores().sequence_accuracy == pytest.approx(2 / 3)
