"""Teaches T5 and CLIP to parse captions into the attributes of their scenes. `python -m local.tinyflux.make.train_text SECONDS`

Writes text.pt. The learning rate follows the clock, so the number of steps depends on the machine.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local.tinyflux.make.scenes import Attributes, draw_scene
from local.tinyflux.make.vocabulary import add_strange_words, list_strange_words, read_vocabulary
from local.tinyflux.text import CLIP, CLIP_WIDTH, T5, T5_HEADS, T5_WIDTH, T5Attention
from local.tinyflux.tokenizer import Tokenizer

CAPTIONS, HELD_OUT, BATCH, LEARNING_RATE, SEED = 24_000, 1000, 128, 3e-3, 77
STRANGE_SHARE = 0.35


def initialise(t5: T5, clip: CLIP) -> None:
    """Start where the layers' scales fit each other."""
    nn.init.normal_(t5.shared.weight, std=0.5)
    for module in t5.modules():
        if isinstance(module, T5Attention):
            nn.init.normal_(module.q.weight, std=(T5_WIDTH * T5_WIDTH / T5_HEADS) ** -0.5)
    nn.init.normal_(clip.get_parameter("text_model.embeddings.token_embedding.weight"), std=0.3)
    nn.init.normal_(clip.get_parameter("text_model.embeddings.position_embedding.weight"), std=0.1)


class Parser(nn.Module):
    """A classifier per attribute: attention pooling over T5's tokens, and a linear layer on CLIP's vector."""

    def __init__(self, vocabulary_size: int, classes: list[list[str]]) -> None:
        super().__init__()
        self.t5, self.clip = T5(vocabulary_size), CLIP(vocabulary_size)
        initialise(self.t5, self.clip)
        self.queries = nn.Parameter(torch.randn(len(classes), T5_WIDTH) * 0.1)
        self.t5_heads = nn.ModuleList([nn.Linear(T5_WIDTH, len(values)) for values in classes])
        self.clip_heads = nn.ModuleList([nn.Linear(CLIP_WIDTH, len(values)) for values in classes])

    def forward(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        states = self.t5(ids)
        weights = (states @ self.queries.T / 4).softmax(1)
        pooled = (weights.transpose(1, 2) @ states).unbind(1)
        vector = self.clip(ids)
        by_t5 = [head(x) for head, x in zip(self.t5_heads, pooled, strict=True)]
        return by_t5, [head(vector) for head in self.clip_heads]


@dataclass
class Lessons:
    captions: list[str]
    targets: Tensor  # (captions, attributes)
    keys: list[str]
    classes: list[list[str]]


def draw_lessons(rng: Random, count: int) -> Lessons:
    drawn: list[tuple[str, Attributes]] = [draw_scene(rng, 8, 8)[1:] for _ in range(count)]
    keys = list(drawn[0][1])
    classes = [sorted({attributes[key] for _, attributes in drawn}) for key in keys]
    rows = [[values.index(attributes[key]) for key, values in zip(keys, classes, strict=True)] for _, attributes in drawn]
    return Lessons([caption for caption, _ in drawn], torch.tensor(rows), keys, classes)


def learning_rate(share: float, step: int) -> float:
    """Warm-up of 30 steps, flat, linear decay over the second half of the time."""
    return LEARNING_RATE * min(1, (step + 1) / 30) * max(0.02, min(1, (1 - share) / 0.5))


def parsing_loss(by_t5: list[Tensor], by_clip: list[Tensor], target: Tensor) -> Tensor:
    pairs = zip(by_t5, by_clip, target.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(a, wanted) + 0.5 * F.cross_entropy(b, wanted) for a, b, wanted in pairs]).sum()


def train(folder: Path, seconds: float, captions: int = CAPTIONS) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rng = Random(SEED)
    vocabulary = read_vocabulary(folder)
    tokenizer, strange = Tokenizer(vocabulary), list_strange_words(vocabulary)
    lessons = draw_lessons(rng, captions)
    learnt = captions - min(HELD_OUT, captions // 4)
    parser = Parser(len(vocabulary), lessons.classes)
    optimizer = torch.optim.AdamW(parser.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, step = time.time(), 0
    while (share := (time.time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, step)
        chosen = [rng.randrange(learnt) for _ in range(BATCH)]
        texts = [lessons.captions[index] for index in chosen]
        texts = [add_strange_words(text, rng, strange) if rng.random() < STRANGE_SHARE else text for text in texts]
        by_t5, by_clip = parser(tokenizer(texts))
        loss = parsing_loss(by_t5, by_clip, lessons.targets[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parser.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(step, round(time.time() - start), loss.item(), flush=True)
    print("steps", step, "held-out accuracy", measure(parser, tokenizer, lessons, learnt))
    torch.save({"t5": parser.t5.state_dict(), "clip": parser.clip.state_dict()}, folder / "text.pt")


@torch.no_grad()
def measure(parser: Parser, tokenizer: Tokenizer, lessons: Lessons, learnt: int) -> dict[str, dict[str, float]]:
    """Share of right attributes on captions that were not learnt, by encoder and attribute."""
    by_t5, by_clip = parser(tokenizer(lessons.captions[learnt:]))
    targets = lessons.targets[learnt:].unbind(1)
    return {
        name: {
            key: round((guess.argmax(1) == wanted).float().mean().item(), 3)
            for key, guess, wanted in zip(lessons.keys, guesses, targets, strict=True)
        }
        for name, guesses in (("T5", by_t5), ("CLIP", by_clip))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.seconds, arguments.captions)


if __name__ == "__main__":
    main()
