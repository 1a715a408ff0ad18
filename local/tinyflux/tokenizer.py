"""WordPiece: known words whole, everything else in letter pairs. It equals the `tokenizer.json` beside the weights."""

import json
import re
import unicodedata
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

PAD, END, UNKNOWN = 0, 1, 2
TEXT_TOKENS = 24  # longer captions are cut
WORDS = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")
LONGEST_WORD = 100  # letters; longer ones are one unknown token, as in the `tokenizers` library


def split_words(text: str) -> list[str]:
    """Lower-case words, digits and signs of a text, accents removed."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return WORDS.findall(plain)


class Tokenizer:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json` of the `tokenizers` library, or a bare {word: id} file."""
        content = json.loads(path.read_text("utf-8"))
        return cls(content["model"]["vocab"] if "model" in content else content)

    @cached_property
    def longest_entry(self) -> int:
        return max(map(len, self.vocabulary))

    def split_word(self, word: str) -> list[int]:
        """Greedy longest pieces; a word with an unknown letter becomes one unknown token."""
        if len(word) > LONGEST_WORD:
            return [UNKNOWN]
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(min(len(word), start + self.longest_entry), start, -1):
                token = self.vocabulary.get(prefix + word[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return [UNKNOWN]
        return ids

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids (texts, 24), each row ended by END and padded."""
        rows = torch.full((len(texts), TEXT_TOKENS), PAD, dtype=torch.long)
        for row, text in enumerate(texts):
            ids: list[int] = []
            for word in split_words(text):
                ids += self.split_word(word)
                if len(ids) >= TEXT_TOKENS:
                    break
            ids = [*ids[: TEXT_TOKENS - 1], END]
            rows[row, : len(ids)] = torch.tensor(ids)
        return rows
