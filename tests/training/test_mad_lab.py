"""The protocol `mad-lab` trains as the reference code: one AdamW group, no clipping, one rate."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mad_efla.plan import expand
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Scores
from mad_efla.tasks import IGNORE
from mad_efla.training import data, model
from mad_efla.training.loop import Loop
from tests.tiny import tiny

STEPS = 20


@pytest.fixture
def run():
    (published, *_) = expand.expand("recall", "mad_lab", ["optim.weight_decay=0.1", "mixers=[efla]"], "float32").runs
    small = tiny(mixers=["efla"], train__loss="sequence", train__steps=STEPS, task__seq_len=16)
    return small.model_copy(update={"optim": published.optim.model_copy(update={"lr": 1e-2})})


def as_published(run):
    """Train as the reference does: every parameter in one group, batches in our order."""
    net = model.build(run).double()  # or rounding grows beyond what is asked within a few steps
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    examples = data.make(run.task, run.seed, run.data).train
    inputs, targets = torch.from_numpy(examples.inputs), torch.from_numpy(examples.next_tokens)
    n, size, losses = len(inputs), run.train.batch_size, []
    for epoch in itertools.count():
        order = torch.from_numpy(data.stream(run.seed, "order", epoch).permutation(n))
        for rows in order.split(size):
            logits = net(inputs[rows])
            loss = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten().long(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == STEPS:
                return losses, net


def test_twenty_steps_are_those_of_the_reference(run, tmp_path):
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    ours = Loop(run, folder, torch.device("cpu"))
    ours.model.double()
    for _ in range(STEPS):
        ours.train_step()
    losses, net = as_published(run)
    assert torch.stack(ours.losses).tolist() == pytest.approx(losses, abs=1e-6)
    for found, wanted in zip(ours.model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_it_stops_at_macro_accuracy(tmp_path, monkeypatch):
    run = tiny(train__stop_at=0.9, train__select_split="test", train__stop_metric="macro_accuracy")
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    found = Loop(run, folder, torch.device("cpu"))
    scores = {"loss": 1.0, "sequence_accuracy": 0.5, "token_accuracy": 0.95, "macro_accuracy": 0.85}
    monkeypatch.setattr(Loop, "_scores", lambda loop, split: Scores(**scores))
    found._evaluate()
    assert found.stopped is None
    scores["macro_accuracy"] = 0.92
    found._evaluate()
    assert found.stopped.startswith("solved: test macro accuracy 0.9200 reached 0.9")
