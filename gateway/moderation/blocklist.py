"""A list of words, phrases and regular expressions, and whether a text holds one of them in whatever disguise. Pure; it reads no file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Letters of other scripts that look like Latin ones, after case was folded; accents and full-width forms are undone before.
_LOOK_LIKE = {
    "a": "аαɑᴀ", "b": "вьβʙ", "c": "сϲᴄ", "d": "ԁᴅđ", "e": "еεҽᴇ", "g": "ɡɢ", "h": "һнʜħ", "i": "іιıɩɪ", "j": "јϳᴊ", "k": "кκᴋ",
    "l": "ӏʟł", "m": "мᴍ", "n": "пηɴ", "o": "оοσᴏøө", "p": "рρᴘ", "q": "ԛ", "r": "гʀ", "s": "ѕꜱ", "t": "тτᴛ", "u": "υᴜս",
    "v": "νᴠѵ", "w": "ԝωшᴡ", "x": "хχ×", "y": "уүγʏ", "z": "ᴢ",
}  # fmt: skip
_ALIKE = {ord(other): latin for latin, others in _LOOK_LIKE.items() for other in others}
# Digits and signs that stand for letters, in words that are spelled with them; one for either of two.
_SPELLED = [str.maketrans("0134578@$!|+", f"o{one}eastbasi{one}t") for one in "il"]
_LONG_RUN = re.compile(r"(.)\1{2,}")
_INSIDE = re.compile(r"(?<=\w)[^\w\s]+(?=\w)|_")
_SPACED = re.compile(r"(?<!\w)\w(?:[\W_]+\w){2,}(?!\w)")
_GAPS = re.compile(r"[\W_]+")


class BrokenEntry(ValueError):
    """A regular expression that is none; the message says which line and why."""


def flatten(text: str) -> str:
    """Without case, accents, invisible characters, and letters that only look like others."""
    seen = (letter for letter in unicodedata.normalize("NFKD", text.casefold()) if unicodedata.category(letter) not in ("Mn", "Me", "Cf"))
    return "".join(seen).casefold().translate(_ALIKE)


def _tokens(text: str) -> str:
    """Words with one space before, between and behind them."""
    return f" {_GAPS.sub(' ', text).strip()} "


def _join(found: re.Match[str]) -> str:
    """Single letters as one word; the first may be a word of its own, as in `a w o r d`."""
    word = _GAPS.sub("", found[0])
    return f"{word} {word[1:]}"


def _views(flat: str) -> Iterator[str]:
    """The ways a text can be read: as it stands, without signs in words, with single letters put together, with lengthened letters."""
    joined = _SPACED.sub(_join, flat)
    for text in {flat, joined, _INSIDE.sub("", flat), _INSIDE.sub("", joined)}:
        for shown in {text, *(text.translate(table) for table in _SPELLED)}:
            yield from {_tokens(one) for one in (shown, _LONG_RUN.sub(r"\1", shown), _LONG_RUN.sub(r"\1\1", shown))}


class Blocklist(NamedTuple):
    """What is blocked: words by themselves, words in a row, and patterns over the flattened text."""

    words: frozenset[str]
    phrases: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]

    def blocks(self, text: str) -> bool:
        flat = flatten(text)
        if any(pattern.search(flat) for pattern in self.patterns):
            return True
        views = set(_views(flat))
        return any(not self.words.isdisjoint(view.split()) or any(phrase in view for phrase in self.phrases) for view in views)


def read_blocklist(lines: Iterable[str]) -> Blocklist:
    """One entry a line: a word, words in a row, or `/a regular expression/`; `#` begins a comment. Raises BrokenEntry."""
    words, phrases, patterns = set[str](), list[str](), list[re.Pattern[str]]()
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if len(entry) > 2 and entry.startswith("/") and entry.endswith("/"):
            patterns.append(_compile(entry[1:-1], number))
        elif flat := _tokens(flatten(entry)).strip():
            phrases.append(f" {flat} ") if " " in flat else words.add(flat)
    return Blocklist(frozenset(words), tuple(phrases), tuple(patterns))


def _compile(pattern: str, number: int) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise BrokenEntry(f"line {number} is no regular expression: {error}") from error
