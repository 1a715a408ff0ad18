"""A data set as files: pictures from S3 under names of our own, each with its caption beside it, in the trainer's own folder."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from gateway.datasets.records import Dataset, fill_caption
from gateway.storage import Storage


async def write_dataset(dataset: Dataset, storage: Storage, folder: Path, trigger_word: str | None) -> None:
    """Fill the folder anew. Files that were refused at intake have no object and are left out."""
    await asyncio.to_thread(_empty, folder)
    usable = [(file, file.key) for file in dataset.files if file.key]
    for number, (file, key) in enumerate(usable):
        stem = folder / f"{number:04d}"
        await storage.get_file(key, stem.with_suffix(f".{key.rpartition('.')[2]}"))
        caption = fill_caption(file.caption, trigger_word or dataset.trigger_word, dataset.caption_template)
        await asyncio.to_thread(_write_caption, stem.with_suffix(".txt"), caption or "")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_caption(path: Path, caption: str) -> None:
    # One line: SimpleTuner takes each line of the file for a caption of its own.
    path.write_text(" ".join(caption.split()), encoding="utf-8")
