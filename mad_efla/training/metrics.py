"""Loss and accuracy over scored positions; pure functions of logits and targets."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mad_efla.runs.schema import Scores


class Tally:
    """Sums over batches, from which the scores of a split follow.

    Args:
        vocabulary: Number of classes.
        device: Where the sums live until they are asked for.
    """

    def __init__(self, vocabulary: int, device: torch.device):
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.finite = torch.zeros((), dtype=torch.int64, device=device)  # answers
        # Rows: right answers, answers wanted, answers given, per class.
        self.counts = torch.zeros(3, vocabulary, dtype=torch.int64, device=device)
        # Sequences with all answers right, and with any answer wanted.
        self.sequences = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, logits: Float[Tensor, "n V"], targets: Int[Tensor, "n"], rows: Int[Tensor, "n"]) -> None:
        """Count one batch of scored positions; an answer that is not finite is wrong.

        Args:
            logits: At the scored positions.
            targets: The answers wanted there.
            rows: Which sequence of the batch each position belongs to.
        """
        self.loss += F.cross_entropy(logits.float(), targets, reduction="sum").double()
        finite = logits.isfinite().all(dim=-1)
        self.finite += finite.sum()
        given = logits.argmax(dim=-1)
        correct = (given == targets) & finite
        right = targets[correct]
        wanted = torch.bincount(rows)
        whole = torch.bincount(rows[correct], minlength=len(wanted)) == wanted
        self.sequences += torch.stack([(whole & (wanted > 0)).sum(), (wanted > 0).sum()])
        V = self.counts.shape[1]
        for row, tokens in enumerate((right, targets, given)):
            self.counts[row] += torch.bincount(tokens, minlength=V)

    def accuracy(self) -> tuple[float, float]:
        """Return token accuracy, and the share of answers that are finite."""
        n = max(int(self.counts[1].sum()), 1)
        return int(self.counts[0].sum()) / n, int(self.finite) / n

    def scores(self) -> Scores:
        """Return loss per scored token, and accuracy per token, class and sequence.

        Macro accuracy is the mean over classes of the share answered right, over classes that were
        wanted or given at least once (as torchmetrics' macro average, which mad-lab reports).
        """
        right, wanted, given = self.counts.double().cpu()
        n = max(wanted.sum().item(), 1)
        seen = (wanted + given) > 0
        recall = right / wanted.clamp_min(1)
        return Scores(
            loss=self.loss.item() / n,
            token_accuracy=right.sum().item() / n,
            macro_accuracy=recall[seen].mean().item() if seen.any() else 0.0,
            sequence_accuracy=int(self.sequences[0]) / max(int(self.sequences[1]), 1),
        )
