"""The small files of a run folder, run.json and metrics.jsonl: read through schemas, and copied into checkpoints, which can stand in for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictFloat, StrictInt

from deit_kd.errors import UserError
from deit_kd.files.atomic import flush, write_json
from deit_kd.files.documents import MEGABYTE, Document, check, parse_json, read_bytes
from deit_kd.files.warn import optional, warn

Count = Annotated[StrictInt, Field(ge=0, le=10**15)]
Number = (
    Annotated[StrictFloat, Field(allow_inf_nan=True, le=1e300, ge=-1e300)] | Annotated[StrictInt, Field(ge=-(10**18), le=10**18)]
)
Text = Annotated[str, Field(max_length=10_000)]


class _Kept(Document):
    """A mapping whose other keys are not checked, because no code reads them."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class _Data(_Kept):
    name: Text
    train_images: Count
    val_images: Count
    num_classes: Count


class _Student(_Kept):
    parameters: Count
    gmacs: Number


class _Cache(_Kept):
    views: Count
    features: Text
    logits: Text
    ran: Text
    errors: dict[Text, Number]
    manifest_sha256: Text


class _Teacher(_Kept):
    name: Text
    weights: Text
    sha256: Text
    license: Any  # of a hub's metadata, of any type: the card turns it into text
    parameters: Count
    gmacs: Number
    img_size: Count | None = None
    cache: _Cache | None = None


class _Origin(_Kept):
    source: Text
    license: Any
    sha256: Text | None = None


class _Quick(_Kept):
    batch_norms_folded: Count
    layout: Text
    weights: Text
    feature_error: Number


class _Speed(_Kept):
    teachers: list[_Quick | None]
    compiled: Text | bool | None = None


class _Session(_Kept):
    processes: Count
    micro_batch_size: Count
    commit: Text
    hardware: Text


class Change(Document):
    """A change, accepted by the user, of something that a run depends on."""

    key: Text
    was: Any
    now: Any
    told: Text  # in words, for a card
    step: Count


class _Exported(_Kept):
    step: Count
    chosen_by: Text


class Run(_Kept):
    """The content of run.json."""

    name: Text
    deit_kd: Text
    command: Text
    commit: Text
    versions: dict[Text, Text]
    hardware: Text
    earlier_sessions: list[_Session] = []
    accepted_changes: list[Change] = []
    saved: bool = True  # whether there was a checkpoint; runs of earlier versions do not say
    precision: Text
    environment: dict[Text, Text] = {}
    imports: dict[Text, Text] = {}  # Python files of the user -> sha256
    augmented_on: Text = "cpu"
    decoded_on: Text = "workers"
    processes: Count
    speed: _Speed | None = None
    accumulation_steps: Count
    micro_batch_size: Count
    global_batch_size: Count
    total_steps: Count
    data: _Data
    student: _Student
    finetuned_from: _Origin | None = None
    exported: _Exported | None = None
    held_out_images: Count = 0
    projector_parameters: Count
    teachers: list[_Teacher]


class _Line(Document):
    kind: Text
    step: Count


class _Measured(_Kept):
    __pydantic_extra__: dict[str, Number | list[Number] | None] = Field(init=False)
    kind: Literal["teacher", "train", "projector", "compiled"]
    step: Count


class _Evaluation(_Measured):
    kind: Literal["eval"]  # type: ignore[assignment]
    epoch: Number
    top1: Number
    top5: Number
    images: Count
    seconds: Number


RUN_REMEDY = "put back what train.py wrote there, or give the command of the run again, which makes it anew"


def read_run(folder: Path) -> dict[str, Any]:
    """A run's run.json.

    Raises:
        UserError: it is missing, or not what train.py writes.
    """
    file = folder / "run.json"
    return parse_run(read_bytes(file, RUN_REMEDY, 64 * MEGABYTE), str(file))


def parse_run(content: bytes | str, where: str) -> dict[str, Any]:
    """The content of a run.json that has been read.

    Raises:
        UserError: as `read_run`.
    """
    run = parse_json(content, where, dict[str, Any], RUN_REMEDY)
    check(run, where, Run, RUN_REMEDY)
    return {"earlier_sessions": [], "accepted_changes": [], **run}


def parse_line(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged, for example cut off by a crash."""
    try:
        values = json.loads(line)
        kind = check(values, "", _Line, "").kind
        check(values, "", {"eval": _Evaluation}.get(kind, _Measured if kind in _MEASURED else _Line), "")
    except (ValueError, RecursionError, UserError):
        return None
    return values


_MEASURED = ("teacher", "train", "projector", "compiled")


def read_lines(file: Path) -> str:
    """The text of a metrics.jsonl; empty if there is none.

    Raises:
        UserError: it cannot be read.
    """
    if not file.exists():
        return ""
    return read_bytes(file, "move it away; a checkpoint of the run holds its lines", 1000 * MEGABYTE).decode("utf-8", "replace")


def are_ours(text: str) -> bool:
    """Whether train.py wrote all lines of a metrics.jsonl; a part is enough of the last one, and a crash may leave zeros."""
    *lines, last = text.replace("\0", "").split("\n")
    begin = '{"kind": "'
    whole = all(parse_line(line) is not None for line in lines if line.strip())
    return whole and (not last.strip() or parse_line(last) is not None or last[: len(begin)] == begin[: len(last)])


def copies(folder: Path) -> dict[str, str]:
    """run.json and metrics.jsonl of a run for a checkpoint; what cannot be read is left out."""
    found = {}
    for name in ("run.json", "metrics.jsonl"):
        with optional(f"copying {folder / name} into the checkpoint"):
            if (folder / name).exists():
                flush(folder / name)
                found[name] = (folder / name).read_bytes().decode("utf-8", "replace")
    return found


def note_saved(folder: Path) -> None:
    """Writes into run.json that the run has had a checkpoint: from now on only --resume none begins it anew."""
    with optional(f"writing {folder / 'run.json'}"):
        try:
            run = read_run(folder)
        except UserError as error:
            if (folder / "run.json").exists():
                warn(str(error))
            return
        if not run.get("saved"):
            write_json(folder / "run.json", {**run, "saved": True})


def plain(value: Any) -> Any:
    """Values as JSON keeps them; bytes of names that are not UTF-8 become escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
