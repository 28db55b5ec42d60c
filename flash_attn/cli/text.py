"""The demo's training text, which every Python carries, and its tokens."""

import importlib
import pydoc
import re
from collections import Counter

import torch
from torch import Tensor

# Where a distribution leaves the manual's topics out, the docstrings of these modules are there.
DOCUMENTED = (
    "argparse",
    "asyncio",
    "collections",
    "ctypes",
    "datetime",
    "email",
    "http",
    "inspect",
    "logging",
    "typing",
)


# Quotes and dashes of ASCII; the asterisks of emphasis and of lists go.
PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--", "*")


def corpus() -> str:
    """The prose of Python's manual as `help()` knows it, in ASCII: a paragraph a line, about 300,000 characters."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        pages = [topics[name] for name in sorted(topics)]
    except ImportError:
        pages = [pydoc.plain(pydoc.render_doc(importlib.import_module(name))) for name in DOCUMENTED]
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(pages).translate(PLAIN))
    prose = [" ".join(paragraph.split()) for paragraph in paragraphs if is_prose(paragraph)]
    return "\n".join(prose).encode("ascii", "ignore").decode()


def is_prose(paragraph: str) -> bool:
    """Not a heading, an example or a grammar."""
    is_sentence = re.fullmatch(r"\s*[A-Z].*[.:]\s*", paragraph, re.DOTALL) is not None
    return is_sentence and len(paragraph.split()) > 8 and ">>>" not in paragraph and "::=" not in paragraph


class Vocabulary:
    """Frequent words, with the space before them, are tokens; others are spelt."""

    PIECE = re.compile(r" ?[A-Za-z_]+|\s+|.")

    def __init__(self, text: str, size: int):
        letters = sorted(set(text))
        counts = Counter(piece for piece in self.PIECE.findall(text) if len(piece) > 1)
        # Ties in alphabetical order, so that the vocabulary is a function of the text.
        words = sorted(counts, key=lambda piece: (-counts[piece], piece))[: max(0, size - len(letters))]
        self.tokens = letters + words
        self._index = {token: index for index, token in enumerate(self.tokens)}

    def encode(self, text: str) -> Tensor:
        """int64 [tokens]; letters that the text of the constructor did not have are left out."""
        indices: list[int] = []
        for piece in self.PIECE.findall(text):
            if piece in self._index:
                indices.append(self._index[piece])
            else:
                indices += [self._index[letter] for letter in piece if letter in self._index]
        return torch.tensor(indices, dtype=torch.int64)

    def decode(self, indices: list[int]) -> str:
        """The text of tokens."""
        return "".join(self.tokens[index] for index in indices)
