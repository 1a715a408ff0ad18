"""The 929 tokens: every word of 20 000 captions, some more, letters and letter pairs. `python -m local.tinyflux.make.vocabulary`"""

import argparse
import json
import pydoc_data.topics
import re
import string
from pathlib import Path
from random import Random

from local.tinyflux.make.scenes import draw_scene
from local.tinyflux.tokenizer import WORDS

VOCABULARY_FILE = Path("vocab.json")
CAPTIONS, SEED = 20_000, 3
MORE_WORDS = (
    "magenta navy aqua lime gold maroon beige sun stars sky lake river hill trees forest flowers background wallpaper logo icon",
    "and or with without of the a an in on under tok sks style cute",
)


def collect_vocabulary(captions: int = CAPTIONS) -> dict[str, int]:
    """{token: id}; the first three ids are those of the tokenizer."""
    rng = Random(SEED)
    words: set[str] = set()
    for _ in range(captions):
        words.update(WORDS.findall(draw_scene(rng, 8, 8)[1].lower()))
    letters = string.ascii_lowercase
    words.update(*(line.split() for line in MORE_WORDS), letters, string.digits, ",.!?:;'\"()-")
    pieces = ["##" + letter for letter in letters] + ["##" + a + b for a in letters for b in letters]
    return {token: index for index, token in enumerate(["[PAD]", "[EOS]", "[UNK]", *sorted(words), *pieces])}


def read_vocabulary(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads((folder / VOCABULARY_FILE).read_text("utf-8"))
    return vocabulary


def list_strange_words(vocabulary: dict[str, int]) -> list[str]:
    """Common English words that the vocabulary lacks, from Python's own help text."""
    words = re.findall(r"[a-z]{3,10}", str(pydoc_data.topics.topics).lower())
    return [word for word in sorted(set(words)) if word not in vocabulary]


def add_strange_words(caption: str, rng: Random, strange: list[str]) -> str:
    """Insert 1-3 of them, or letter salads, so that unknown words do no harm."""
    words = caption.split()
    for _ in range(rng.randint(1, 3)):
        salad = rng.random() >= 0.8
        word = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 7))) if salad else rng.choice(strange)
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    arguments = parser.parse_args()
    vocabulary = collect_vocabulary(arguments.captions)
    (arguments.folder / VOCABULARY_FILE).write_text(json.dumps(vocabulary), "utf-8")
    print(len(vocabulary), "tokens")


if __name__ == "__main__":
    main()
