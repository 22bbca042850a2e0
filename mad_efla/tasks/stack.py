"""Stack: many stacks at once; each pop must say what was put last onto the stack it names.

    push 1 a  push 2 b  push 1 c  pop 1 c  pop 2 b  pop 1 a        at 1, 2, 1 behind pop: c, b, a

Each stack is a memory of its own that gives back the newest and then, when that is gone, what lay
below. So an element that was hidden must survive, and one that was popped must be given up.

Letters: elements [0, E), stacks [E, E + S), push E + S, pop E + S + 1. Operations of three tokens,
each on any stack, alike: to push onto it if it is empty, else to push or to pop, alike; elements
are drawn alike. The last operation is a pop of one of the stacks that hold something. What is
popped is scored, at the stack's id, in training as in test.

Source: Kimi Team 2025, arXiv 2510.26692, section 5.1: 64 stacks, 256 to 2,048 tokens. How it draws
operations and elements it does not say, so that is ours.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type
from mad_efla.tasks.parity import check_lengths


class Stack(Task):
    """Pushing onto and popping from many stacks.

    Attributes:
        stacks: How many.
        elements: How many different things can be pushed.
        seq_len: Tokens the model sees, three per operation.
    """

    name: Literal["stack"] = "stack"
    stacks: int = Field(64, le=10_000)
    elements: int = Field(64, le=10_000)
    seq_len: int = Field(255, le=1_000_000)

    @model_validator(mode="after")
    def _check(self) -> "Stack":
        check_lengths(self.seq_len, None, least=6, step=3)
        if self.stacks < 1:
            raise ValueError(f"stacks={self.stacks} must be at least 1")
        if self.elements < 2:
            raise ValueError(f"elements={self.elements} must be at least 2; one has nothing to say")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.elements + self.stacks + 2

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        E, S, count, rows = self.elements, self.stacks, self.seq_len // 3, np.arange(n)
        chosen = rng.integers(0, S, (n, count))
        pops = rng.random((n, count)) < 0.5
        said = rng.integers(0, E, (n, count))
        weight = rng.random((n, S))

        # A stack is a chain: the operation that pushed its top, and for each that of the one below.
        top, below = np.full((n, S), -1), np.full((n, count), -1)
        for t in range(count):
            if t == count - 1:
                chosen[:, t], pops[:, t] = np.where(top >= 0, weight, -1.0).argmax(axis=1), True
            stack = chosen[:, t]
            held = top[rows, stack]
            pops[:, t] &= held >= 0
            said[:, t] = np.where(pops[:, t], said[rows, held], said[:, t])
            below[:, t] = held
            top[rows, stack] = np.where(pops[:, t], below[rows, held], t)

        inputs = np.stack([E + S + pops, E + chosen, said], axis=2).reshape(n, self.seq_len)
        inputs = inputs.astype(token_type(self.vocabulary))
        targets = np.full_like(inputs, IGNORE)
        targets[:, 1::3] = np.where(pops, said, IGNORE)
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Keep the stacks; take from one when it is popped."""
        del world
        answers = np.full(len(inputs), IGNORE)
        stacks: dict[int, list[int]] = {}
        push, stack = self.elements + self.stacks, 0
        act = push
        for position, token in enumerate(inputs.tolist()):
            if token >= push:
                act = token
            elif token >= self.elements:
                stack = token
                if act > push:
                    answers[position] = stacks[stack].pop()
            elif act == push:
                stacks.setdefault(stack, []).append(token)
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name operations, stacks and elements."""
        E, S = self.elements, self.stacks
        return [
            "token" if t < E else "stack" if t < E + S else "\N{DOWNWARDS ARROW}" if t == E + S else "\N{UPWARDS ARROW}"
            for t in inputs.tolist()
        ]
