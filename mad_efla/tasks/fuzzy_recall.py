"""Fuzzy recall: in-context recall whose keys and values are one to three tokens long.

    _ _ k3 k1 v2 | k2 v1 v3 | k3 k1 v2 | ... | k2 -> v1 v3

Nothing marks where a pair ends (the bars are for the reader) but that keys and values are made of
different ids. A key is a tuple of different ids; (k3), (k3, k1) and (k1, k3) are three keys. Each
has one value in a sequence, and the last key is one shown before.

Letters: n ordinary tokens, keys made of [0, n/2), values of [n/2, n); pad V - 1, on the left, or
with single-query pad V - 2 and copy token V - 1, before the last key. P tokens of the probe, the
pair asked for last; M = key_tokens + value_tokens, the longest pair.
Multi-query scores every token of a value whose key was seen before, answered one step ahead;
single-query only the last value.

Training draws key lengths evenly. Test keys all have full length, a shift on purpose: who learned
that length is no hint answers them too. Validation is drawn like test, since it chooses what is
scored there: chosen on short keys, the weights would be the best of another task.

Source: Poli et al. 2024, arXiv 2403.17844, section 4 and appendix B. The probe is put into the
sequence at the first pair that starts at or after a drawn offset in [0, seq_len - 2 P). Departure:
where no pair starts so late, it goes before the last one. The reference code then leaves it out and
asks for what was never shown; `as_mad_lab` keeps that.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, distinct, token_type


class FuzzyRecall(Task):
    """In-context recall of tuples.

    Attributes:
        vocab_size: Token ids in all, pad and the copy token of single-query included.
        seq_len: Tokens the model sees, padding included.
        multi_query: Score every key seen before, not only the last.
        key_tokens: Tokens of the longest key, 1 to 4.
        value_tokens: Tokens of the longest value, 1 to 4.
        as_mad_lab: Sometimes ask for a key that was never shown, as the reference code does.
    """

    name: Literal["fuzzy_recall"] = "fuzzy_recall"
    vocab_size: int = Field(16, le=30_000)
    seq_len: int = Field(128, le=1_000_000)
    multi_query: bool = True
    key_tokens: int = 3
    value_tokens: int = 3
    as_mad_lab: bool = False

    @model_validator(mode="after")
    def _check(self) -> "FuzzyRecall":
        for field in ("key_tokens", "value_tokens"):
            if not 1 <= getattr(self, field) <= 4:
                raise ValueError(f"{field}={getattr(self, field)} must be 1, 2, 3 or 4")
        ids = 2 * max(self.key_tokens, self.value_tokens, 2)
        if self._ordinary < ids:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {ids + self._special}: {ids} ids "
                f"for keys of {self.key_tokens} and values of {self.value_tokens} different "
                f"tokens, and the {'pad' if self.multi_query else 'pad and copy tokens'}; "
                "raise it or lower key_tokens or value_tokens"
            )
        if self.seq_len <= 2 * self._longest:
            raise ValueError(
                f"seq_len={self.seq_len} must be more than {2 * self._longest}, two pairs of "
                f"key_tokens={self.key_tokens} and value_tokens={self.value_tokens}; raise it or "
                "lower them"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    @property
    def _special(self) -> int:
        return 1 if self.multi_query else 2

    @property
    def _ordinary(self) -> int:
        return self.vocab_size - self._special

    @property
    def _longest(self) -> int:
        return self.key_tokens + self.value_tokens

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; keys have full length in validation and test."""
        del world
        shortest = 1 if split == "train" else self.key_tokens
        probe = self._draw(n, rng, shortest)
        P = (probe >= 0).sum(axis=1)
        offset = rng.integers(0, self.seq_len - 2 * P)
        limit = self.seq_len - P - self._longest  # no pair starts at or after it
        slots = -(-(self.seq_len - self._longest) // (shortest + 1))  # enough for the shortest
        pairs = self._draw(n * slots, rng, shortest).reshape(n, slots, -1)
        seen, is_probe = self._settle(pairs, probe)

        length = (pairs >= 0).sum(axis=2)
        start = length.cumsum(axis=1) - length
        fitting = (start < limit[:, None]).sum(axis=1)
        at = (start < offset[:, None]).sum(axis=1)  # the pair that the probe goes before
        if not self.as_mad_lab:
            at = np.minimum(at, fitting - 1)
        later = np.arange(slots) >= at[:, None]
        inserted = (at < fitting) & ~(is_probe & ~later).any(axis=1)
        shift = np.where(inserted, P, 0)
        used = start + later * shift[:, None] < limit[:, None]
        seen |= is_probe & later & inserted[:, None]
        return self._write(pairs, used, seen, probe, np.where(used & ~later, length, 0).sum(1), shift)

    def _draw(self, n: int, rng: np.random.Generator, shortest: int) -> Int[np.ndarray, "n M"]:
        """Draw `n` pairs: tokens of the key, then of the value, `_ABSENT` where it is shorter."""
        half = self._ordinary // 2
        parts = [(self.key_tokens, shortest, 0, half), (self.value_tokens, 1, half, self._ordinary)]
        columns = []
        for longest, least, low, high in parts:
            tokens = distinct(rng, n, longest, low, high).astype(token_type(self.vocab_size))
            length = rng.integers(least, longest + 1, (n, 1), dtype=np.int8)
            columns.append(np.where(np.arange(longest) < length, tokens, _ABSENT))
        return np.concatenate(columns, axis=1)

    def _settle(
        self, pairs: Int[np.ndarray, "n slots M"], probe: Int[np.ndarray, "n M"]
    ) -> tuple[Bool[np.ndarray, "n slots"], Bool[np.ndarray, "n slots"]]:
        """Give each key of a sequence one value, in place: that of its first slot, or the probe's.

        Returns:
            Whether a slot's key stood in an earlier slot, and whether it is the probe's.
        """
        n, slots, _ = pairs.shape
        digits = np.int64(self._ordinary + 1) ** np.arange(self.key_tokens)
        code = (pairs[..., : self.key_tokens] + 1) @ digits
        is_probe = code == ((probe[:, : self.key_tokens] + 1) @ digits)[:, None]

        # Sorted by key, then by slot, the slots of a key are neighbours and its first one leads.
        order = code.argsort(axis=1, kind="stable")
        rows = np.arange(n)[:, None]
        ranked = code[rows, order]
        leads = np.ones((n, slots), bool)
        leads[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
        leader = np.maximum.accumulate(np.where(leads, np.arange(slots), 0), axis=1)
        first = np.empty_like(order)
        first[rows, order] = order[rows, leader]

        pairs[..., self.key_tokens :] = pairs[rows, first, self.key_tokens :]
        repeated = np.broadcast_to(probe[:, None], pairs.shape)[is_probe]
        pairs[is_probe, self.key_tokens :] = repeated[:, self.key_tokens :]
        return first < np.arange(slots), is_probe

    def _write(
        self,
        pairs: Int[np.ndarray, "n slots M"],
        used: Bool[np.ndarray, "n slots"],
        seen: Bool[np.ndarray, "n slots"],
        probe: Int[np.ndarray, "n M"],
        before: Int[np.ndarray, "n"],
        shift: Int[np.ndarray, "n"],
    ) -> Examples:
        """Write used pairs, the probe behind `before` tokens of them if `shift`, and the query.

        Tokens are taken in the order of pairs and put in the order of positions, so that the two
        masks of a row need only be true equally often.
        """
        P = (probe >= 0).sum(axis=1)
        taken = used[..., None] & (pairs >= 0)
        end = taken.sum(axis=(1, 2)) + shift  # of the pairs
        total = end + P + (not self.multi_query)
        position = np.arange(self.seq_len + 1) - (self.seq_len + 1 - total)[:, None]
        before, end, shift = before[:, None], end[:, None], shift[:, None]
        inserted = (position >= before) & (position < before + shift)
        body = (position >= 0) & (position < end) & ~inserted
        query = position >= total[:, None] - P[:, None]

        tokens = np.full(position.shape, self._ordinary, pairs.dtype)  # the pad
        tokens[body] = pairs[taken]
        tokens[query] = probe[probe >= 0]
        shown = np.where(shift > 0, probe, _ABSENT)
        tokens[inserted] = shown[shown >= 0]
        answers = np.full_like(tokens, IGNORE)
        is_value = np.arange(self._longest) >= self.key_tokens
        if self.multi_query:
            answers[body] = np.where(seen[..., None] & is_value, pairs, IGNORE)[taken]
        else:
            tokens[position == end] = self.vocab_size - 1
        answers[query] = np.where(is_value, probe, IGNORE)[probe >= 0]
        return Examples(tokens[:, :-1].copy(), answers[:, 1:].copy(), tokens[:, 1:].copy())

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Split the sequence where values give way to keys; look each key up as far as it goes."""
        del world
        answers = np.full(len(inputs), IGNORE)
        half = self._ordinary // 2
        value_of: dict[tuple[int, ...], list[int]] = {}
        key: tuple[int, ...] = ()
        value: list[int] = []
        for position, token in enumerate(inputs.tolist()):
            if token < half and value:
                value_of.setdefault(key, value)
                key, value = (token,), []
            elif token < half:
                key = (*key, token)
            elif token < self._ordinary:
                value.append(token)
            else:
                continue
            known = value_of.get(key, [])
            if len(value) < len(known):
                answers[position] = known[len(value)]
        return answers

    def answerable(self, examples: Examples, train: Examples, world: Any) -> Bool[np.ndarray, "n L"]:
        """Tell which positions ask for a key that was shown: as the reference draws, not all do."""
        scored = super().answerable(examples, train, world)
        if not self.as_mad_lab:
            return scored
        n, L = examples.inputs.shape
        padded = np.full((n, self.key_tokens - 1 + L), self._ordinary, np.int64)
        padded[:, self.key_tokens - 1 :] = examples.inputs
        is_key = padded < self._ordinary // 2
        code, reach = np.zeros((n, L), np.int64), np.ones((n, L), bool)
        for back in range(self.key_tokens):  # the key that ends here, read backwards
            window = slice(self.key_tokens - 1 - back, self.key_tokens - 1 - back + L)
            reach &= is_key[:, window]
            code = code * (self._ordinary + 1) + np.where(reach, padded[:, window] + 1, 0)
        ends = is_key[:, -L:].copy()
        ends[:, :-1] &= ~is_key[:, -L + 1 :]
        last = L - 1 - ends[:, ::-1].argmax(axis=1)
        asked = code[np.arange(n), last]
        shown = (ends & (code == asked[:, None])).sum(axis=1) > 1
        return scored & (shown[:, None] | (np.arange(L) < last[:, None]))

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name tokens of keys and values, the pad and the copy token."""
        n = self._ordinary
        return ["key" if t < n // 2 else "value" if t < n else "pad" if t == n else "copy" for t in inputs.tolist()]


_ABSENT = -1  # in place of a token that a shorter key or value does not have
