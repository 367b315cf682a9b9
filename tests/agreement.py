"""How alike two models are: what each expects after every token of one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PYTHON_TEXT = '''def fibonacci(n):
    """Return the first n Fibonacci numbers."""
    numbers = [0, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:n]


class Stack:
    """A stack of items, the last one in is the first one out."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file if line.strip()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="files to read")
    args = parser.parse_args(argv)
    for path in args.paths:
        print(path, len(read_lines(path)))


if __name__ == "__main__":
    sys.exit(main())
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of two models on a text.

    Attributes:
        same_top: Part of the places at which both expect the same token most.
        divergence: Mean Kullback-Leibler divergence of the second from the first, in nats.
        perplexities: Of the text, by each.
    """

    same_top: float
    divergence: float
    perplexities: tuple[float, float]


def agreement(exact: Tensor, other: Tensor, tokens: Sequence[int]) -> Agreement:
    """Of logits [tokens, vocabulary] of two models on the same tokens."""
    first, second = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    following = torch.tensor(tokens[1:])[:, None]
    perplexities = [float((-each[:-1].gather(1, following).mean()).exp()) for each in (first, second)]
    return Agreement(
        same_top=float((first.argmax(-1) == second.argmax(-1)).double().mean()),
        divergence=float((first.exp() * (first - second)).sum(-1).mean()),
        perplexities=(perplexities[0], perplexities[1]),
    )
