"""Base models into ComfyUI's models folder and out of it again: what is missing is fetched and checked, what is used least makes room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from comfy_workflows.base_models import BaseModelInfo
from gateway.jobs.model import now_ms
from gateway.models.folder import Brought, Manifest, ModelFolder
from gateway.outside.hub_files import HubFiles, Offer, PullFailed, hash_file

GB = 1_000_000_000
# What was at work so lately may be loaded again in a moment.
HELD_MS = 600_000
Say = Callable[[str], None]


class Wanted(NamedTuple):
    """One file of a base model: its place below the models folder, and what the hub has for it."""

    name: str
    repository: str
    path: str
    offer: Offer


def place_of(model: BaseModelInfo, role: str) -> str:
    return f"{model.sources[role].folder}/{model.files[role]}"


def pull(model: BaseModelInfo, folder: ModelFolder, hub: HubFiles, min_free_bytes: int, say: Say) -> None:
    """Bring every file that is missing. Raises PullFailed, Conflict; what was brought before stays."""
    if not model.sources:
        raise PullFailed(f"{model.name} comes from {model.source}, not from Hugging Face.", hint="`make run` brings the built-in model.")
    with folder.alone():
        # All of them are asked for first: a licence that is missing is said before gigabytes are fetched.
        wanted = [
            Wanted(place_of(model, role), source.repository, source.path, hub.look(source.repository, source.path))
            for role, source in model.sources.items()
        ]
        missing = [each for each in wanted if not _is_there(each, model, folder, say)]
        _require_room(missing, folder, min_free_bytes)
        for each in missing:
            _bring(each, model, folder, hub, say)


def _is_there(each: Wanted, model: BaseModelInfo, folder: ModelFolder, say: Say) -> bool:
    """Whether the right file has that name. One of ours is believed; of another the bytes are read. Raises PullFailed for a wrong one."""
    path, manifest = folder.place(each.name), folder.read()
    if not path.exists():
        return False
    known = manifest.files.get(each.name)
    size = path.stat().st_size
    right = size == each.offer.size_bytes and each.offer.sha256 == (known.sha256 if known else hash_file(path))
    if right:
        say(f"{each.name} is there" + ("" if known else ", not brought from here"))
        if known and model.name not in known.base_models:
            manifest.files[each.name] = known.model_copy(update={"base_models": (*known.base_models, model.name)})
            folder.write(manifest)
        return True
    if known:
        return False
    raise PullFailed(f"{path} is another file than {each.repository}/{each.path}.", hint="Move it away, then pull again.")


def _require_room(missing: list[Wanted], folder: ModelFolder, min_free_bytes: int) -> None:
    parts = [folder.part(each.offer.sha256) for each in missing]
    needed = sum(each.offer.size_bytes for each in missing) - sum(part.stat().st_size for part in parts if part.exists())
    free = folder.free_bytes()
    if missing and needed + min_free_bytes > free:
        raise PullFailed(
            f"{say_size(needed)} are to be fetched and {say_size(min_free_bytes)} left free; {folder.root} has {say_size(free)}.",
            hint="Make room (fluxgate models gc), or lower MODELS_MIN_FREE_BYTES.",
            details={"needed_bytes": needed, "free_bytes": free},
        )


def _bring(each: Wanted, model: BaseModelInfo, folder: ModelFolder, hub: HubFiles, say: Say) -> None:
    part = folder.part(each.offer.sha256)
    hub.fetch(each.offer, part, each.name)
    if (found := hash_file(part)) != each.offer.sha256:
        part.unlink()
        raise PullFailed(
            f"{each.name} has the hash {found[:12]}…; {each.repository} says {each.offer.sha256[:12]}….",
            hint="It was thrown away. Pull again; where it stays so, something on the way changes files.",
        )
    folder.put(part, each.name)
    brought = Brought(
        sha256=found,
        size_bytes=each.offer.size_bytes,
        repository=each.repository,
        path=each.path,
        commit=each.offer.commit,
        licence=model.licence,
        brought_ms=now_ms(),
        base_models=(model.name,),
    )
    manifest = folder.read()
    manifest.files[each.name] = brought
    folder.write(manifest)
    say(f"{each.name} is here: {say_size(brought.size_bytes)}, sha256 {found[:12]}…")


def verify(folder: ModelFolder, say: Say) -> bool:
    """Read every file that was brought once more. Whether all are as they were."""
    sound = True
    for name, known in folder.read().files.items():
        path = folder.place(name)
        said = "missing" if not path.exists() else "ok" if hash_file(path) == known.sha256 else "changed"
        sound = sound and said == "ok"
        say(f"{said}\t{name}\t{known.sha256[:12]}…")
    return sound


def collect(folder: ModelFolder, used_ms: Mapping[str, int], kept: str, min_free_bytes: int, say: Say, *, dry_run: bool = False) -> None:
    """Remove whole base models, those used longest ago first, until that much is free. `kept` stays, and so do files others still need."""
    with folder.alone():
        manifest, free = folder.read(), folder.free_bytes()
        if not dry_run:
            folder.drop_parts()
        for base in order_by_use(manifest, used_ms):
            if free >= min_free_bytes:
                break
            if base != kept and now_ms() - used_ms.get(base, 0) > HELD_MS:
                free += _remove(folder, manifest, base, say, dry_run=dry_run)
        if not dry_run:
            folder.write(manifest)
    enough = "enough" if free >= min_free_bytes else "less than is to be: the rest was not brought from here, or is in use"
    say(f"{say_size(free)} free, {say_size(min_free_bytes)} wanted: {enough}")


def order_by_use(manifest: Manifest, used_ms: Mapping[str, int]) -> list[str]:
    """Base models, the one used longest ago first. One that no job used counts from when it was brought."""
    since = dict[str, int]()
    for brought in manifest.files.values():
        for base in brought.base_models:
            since[base] = max(since.get(base, 0), brought.brought_ms, used_ms.get(base, 0))
    return sorted(since, key=lambda base: (since[base], base))


def _remove(folder: ModelFolder, manifest: Manifest, base: str, say: Say, *, dry_run: bool) -> int:
    """Bytes that this makes free."""
    freed = 0
    for name, brought in list(manifest.files.items()):
        others = tuple(other for other in brought.base_models if other != base)
        if len(others) == len(brought.base_models):
            continue
        if others:
            manifest.files[name] = brought.model_copy(update={"base_models": others})
            continue
        del manifest.files[name]
        freed += brought.size_bytes
        say(f"{'would remove' if dry_run else 'removed'} {name} ({say_size(brought.size_bytes)}, {base})")
        if not dry_run:
            folder.remove(name)
    return freed


def say_size(size_bytes: int) -> str:
    return f"{size_bytes / GB:.1f} GB" if size_bytes >= GB else f"{size_bytes / 1e6:.1f} MB"
