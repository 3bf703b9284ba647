"""What a run depends on beside its code, and which of these facts may change when it is resumed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deit_kd.data import Source
from deit_kd.data.sources.fingerprint import sizes
from deit_kd.errors import UserError
from deit_kd.files.atomic import sha256
from deit_kd.files.documents import short
from deit_kd.files.imports import imported
from deit_kd.models import AnyTeacher
from deit_kd.models.loading import file_of
from deit_kd.recipe import renamed
from deit_kd.training.run_files import plain

TRAINING, VALIDATION = "training_images", "validation_images"
MAY_CHANGE = (  # with --accept-changes; files that the recipe names are compared by what is in them
    *("data.on_bad_image", "data.source", "data.train_images", "data.num_classes", TRAINING, VALIDATION),
    *("teacher.weights", "teacher.cache", "teachers.N.teacher.weights", "teachers.N.teacher.cache", "finetune.weights"),
    *("distill.class_means", "teachers.N.distill.class_means", "imports"),
)
OF_DATA = ("classes", "validation_classes", TRAINING, VALIDATION, "teacher_tensors", "starting_weights", "imports")
SOME, MOST_SIZES = 512, 100_000  # images whose content is compared; files whose sizes are looked up


def depends_on(
    keys: Mapping[str, Any], finetuned_from: str | None, sources: tuple[Source, Source], teachers: Iterable[AnyTeacher]
) -> dict[str, Any]:
    """All that a resumed run must find again, one plain value a key.

    Args:
        keys: of the recipe, those that move a number.
        finetuned_from: the weights that training began with, as `finetune.weights` states them.
        sources: train and val.
        teachers: each once.
    """
    train, val = sources
    file = file_of(finetuned_from) if finetuned_from else None
    found = {
        **keys,
        "classes": list(train.class_names),
        "validation_classes": list(val.class_names),
        TRAINING: of_images(train),
        VALIDATION: of_images(val),
        "teacher_tensors": [teacher.info.sha256 for teacher in teachers],
        "starting_weights": None if file is None else sha256(file),
        "imports": imported(),
    }
    return plain(found)


def of_images(source: Source) -> dict[str, Any]:
    """Facts that differ between data sets, whatever their place: number, labels, the content of some images, the sizes of files."""
    content = hashlib.sha256()
    for index in some(source):
        content.update(_content(source, index))
    found = sizes(source) if len(source) <= MOST_SIZES else None
    return {
        "number": len(source),
        "labels": _short_hash(source.labels.astype("<i8").tobytes()),
        "content": content.hexdigest()[:16],
        "sizes": None if found is None else _short_hash(found.astype("<i8").tobytes()),
    }


def some(source: Source) -> list[int]:
    """Indices of images spread over a source, the same each time."""
    return np.random.default_rng(0).permutation(len(source))[:SOME].tolist()


def unreadable(source: Source) -> list[str]:
    """Which of `some` images cannot be read, and why."""
    found = []
    for index in some(source):
        try:
            source[index]
        except Exception as error:  # PIL raises many types for broken files
            found.append(f"{source.where(index)}: cannot be read ({str(error) or type(error).__name__})")
    return found


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each key whose value has changed, with both values. A key that an earlier version did not store is not compared."""
    found = []
    for key, a in renamed.current(was).items():
        b = now.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and key in (TRAINING, VALIDATION):
            known = [name for name in b if None not in (a.get(name), b.get(name))]
            a, b = ({name: each[name] for name in known if a[name] != b[name]} for each in (a, b))
        if a != b:
            found.append({"key": key, "was": a, "now": b})
    return found


def refuse(
    fault: str,
    found: Sequence[Mapping[str, Any]],
    accepted: Collection[str],
    recorded: Sequence[Mapping[str, Any]],
    unreadable: Sequence[str] = (),
    begun: str = "",
) -> None:
    """Ends the run unless each change is accepted now, or was accepted before and is recorded.

    Args:
        fault: the beginning of the line.
        found: `changes`.
        accepted: keys that the user accepts now.
        recorded: changes that were accepted before.
        unreadable: images, and what is wrong with them.
        begun: options that give the recipe which the run began with.

    Raises:
        UserError: every change that is not accepted, with both values and the way out.
    """
    left = [change for change in found if change["key"] not in accepted and not _is_recorded(change, recorded)]
    if not left:
        return
    keys = [change["key"] for change in left]
    way = f"give what it had{begun and f' ({begun})'}, another --output, or --resume none to move that run aside"
    if any(change["key"] == "classes" and sorted(change["was"]) == sorted(change["now"]) for change in left):
        way = f"write the order that it had, as a JSON list, into class_order.json beside train/; or {way}"
    if all(may_change(key) for key in keys):
        wanted = dict.fromkeys([*sorted(accepted), *keys, *([TRAINING] if "data.on_bad_image" in keys else [])])
        if unreadable:
            wanted["data.on_bad_image"] = None
        flag = f"--accept-changes {','.join(wanted)}"
        mend = (
            f"{'; '.join(unreadable[:3])}: remove it, or set data.on_bad_image=skip, and" if unreadable else "to go on with this,"
        )
        way = f"{mend} add {flag}; or {way}"
    raise UserError(f"{fault} ({'; '.join(in_words(change) for change in left[:5])}); {way}")


def may_change(key: str) -> bool:
    """Whether --accept-changes takes this key."""
    return re.sub(r"^teachers\.\d+\.", "teachers.N.", key) in MAY_CHANGE


def parse_accepted(text: str | None) -> tuple[str, ...]:
    """The keys of --accept-changes.

    Raises:
        UserError: one that cannot be accepted.
    """
    keys = tuple(key for key in re.split(r"[,\s]+", text or "") if key)
    for key in keys:
        if not may_change(key):
            raise UserError(
                f"--accept-changes {short(key)}: a run can go on with other {', '.join(MAY_CHANGE)}; give some of these"
            )
    return keys


def of_old(keys: Mapping[str, Any], steps_per_epoch: int | None, classes: Sequence[str]) -> dict[str, Any]:
    """What checkpoints of earlier versions say of the data, beside the recipe's `keys`."""
    return plain({**keys, TRAINING: {"steps_an_epoch": steps_per_epoch}, "classes": list(classes)})


def in_words(change: Mapping[str, Any]) -> str:
    """A change in words."""
    key, was, now = change["key"], change["was"], change["now"]
    if key == "imports":
        files = [", ".join(f"{name} {digest[:8]}" for name, digest in each.items()) or "none" for each in (was or {}, now or {})]
        return f"{key}: {files[0]} -> {files[1]}"
    if isinstance(was, dict) and isinstance(now, dict):
        numbers = [f"{name} {was.get(name)} -> {now[name]}" for name in now if isinstance(now[name], int)]
        return f"{key}: {', '.join([*numbers, *(f'other {name}' for name in now if not isinstance(now[name], int))])}"
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        at = next(n for n in range(len(was)) if was[n] != now[n])
        return f"{key}: number {at} {short(was[at])} -> {short(now[at])}"
    return f"{key}: {short(was) if isinstance(was, list) else was} -> {short(now) if isinstance(now, list) else now}"


def _is_recorded(change: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]]) -> bool:
    last = [each for each in recorded if each["key"] == change["key"]][-1:]
    return any(each["now"] == change["now"] for each in last)


def _content(source: Source, index: int) -> bytes:
    try:
        encoded = source.encoded(index)
        if encoded is not None:
            return hashlib.sha256(encoded).digest()
        image, label = source[index]
        return hashlib.sha256(f"{label} {image.size} ".encode() + image.tobytes()).digest()
    except Exception:  # an unreadable image, which the loader will name or skip
        return b"unreadable"


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
