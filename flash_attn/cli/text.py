"""The demo's training text, which every Python carries, and its tokens."""

import importlib
import pydoc
import re
from collections import Counter

import torch
from torch import Tensor

# Where a distribution leaves the manual's topics out, the docstrings of these modules are there.
DOCUMENTED = ("argparse", "asyncio", "collections", "ctypes", "datetime", "email", "http", "inspect", "logging", "typing")


def corpus() -> str:
    """Python's manual as `help()` knows it, in ASCII; about 400,000 characters."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        pages = [topics[name] for name in sorted(topics)]
    except ImportError:
        pages = [pydoc.render_doc(importlib.import_module(name), renderer=pydoc.plaintext) for name in DOCUMENTED]
    text = "\n\n".join(pages)
    text = re.sub(r"\n?[*=~^\"-]{5,}", "", text)  # underlines of headings
    return re.sub(r" {2,}", " ", text).encode("ascii", "ignore").decode()


class Vocabulary:
    """Frequent words, with the space before them, are tokens; others are spelt."""

    PIECE = re.compile(r" ?[A-Za-z_]+|\s+|.")

    def __init__(self, text: str, size: int):
        letters = sorted(set(text))
        counts = Counter(piece for piece in self.PIECE.findall(text) if len(piece) > 1)
        # Ties in alphabetical order, so that the vocabulary is a function of the text.
        words = sorted(counts, key=lambda piece: (-counts[piece], piece))[: size - len(letters)]
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
