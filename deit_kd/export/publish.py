"""Publishes a finished run on the hub: checks it, assembles the files, and sends them in one commit."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError
from timm.models import model_entrypoint

from deit_kd.errors import UserError
from deit_kd.export.card import REMEDY, files_that_agree
from deit_kd.export.student import PERMISSIVE
from deit_kd.files.atomic import write_json, write_text
from deit_kd.files.documents import MEGABYTE, read_bytes, read_json, short
from deit_kd.files.imports import file_of
from deit_kd.models import load_student
from deit_kd.models.config_json import read_config
from deit_kd.text import for_markdown, for_terminal, hide_secrets, leaks, license_name, printable
from deit_kd.training.best import exported
from deit_kd.training.metrics import read_metrics
from deit_kd.training.run_files import read_run

PICTURES = {
    "loss": "The training loss and its terms",
    "top1": "Top-1 on the validation images",
    "agreement": "How near the student comes to the teacher",
    "learning_rate": "The learning rate",
    "projector": "The singular values of the projector",
    "contact_sheet": "Images, what they are and what they are taken for",
    "time": "Where a step's seconds go",
}
# of a student's folder: what the run wrote, and `deit-kd export` beside it
SENT = {"README.md", "config.json", "model.safetensors", "recipe.yaml", "metrics.jsonl", "LICENSE"}
SENT |= {"model.onnx", "model.onnx.data", "model.pt2"}
LICENSE = Path(__file__).resolve().parent.parent.parent / "LICENSE"
STRANGER = """
import sys
{first}
import timm, torch
assert {first!r} or not any(name.startswith("deit_kd") for name in sys.modules)
student = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.save(student(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def publish(run: Path, repository: str, *, private: bool, dry_run: bool, license: str | None, despite_teacher: bool) -> list[str]:
    """Checks a run's student in a process of its own, and uploads it with card, recipe, metrics, plots and license in one commit.

    What was uploaded before an interruption is not sent again.

    Args:
        run: a folder that train.py made, come to its end.
        repository: ORG/NAME.
        private: whether a new repository is.
        dry_run: everything but the upload; needs no account.
        license: of the weights; None: what the card says.
        despite_teacher: allows a permissive license where those of the weights it learned from are not.

    Returns:
        What was done, a line each.

    Raises:
        UserError: a run that is not finished, a card whose numbers are not those of the run, other logits, a license, no account,
            or a file that holds a secret, a path, or names of pictures.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--to {repository}: is no ORG/NAME")
    student = run / "student"
    for file in (
        "run.json",
        "recipe.yaml",
        "metrics.jsonl",
        "student/model.safetensors",
        "student/config.json",
        "student/README.md",
    ):
        if not (run / file).is_file():
            raise UserError(f"{run}: has no {file}; give a run of train.py that came to its end")
    if not dry_run and get_token() is None:
        raise UserError("no account of the hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write")
    with files_that_agree(run):
        architecture, _, _ = read_config(student / "config.json", REMEDY)
        said = [_same_logits(student), _same_numbers(run)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "student"
        said += _copy(run, folder)
        with files_that_agree(run):
            said.append(_license(run, folder, license, despite_teacher))
            card = (folder / "README.md").read_text(encoding="utf-8")
            card = card.replace("local-dir:PATH/TO/THIS/FOLDER", f"hf-hub:{repository}")
            write_text(folder / "README.md", _with_pictures(card, folder))
        must_be_clean(folder, run)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        said += [f"file      {path.relative_to(folder)}, {path.stat().st_size:,} bytes" for path in files]
        if dry_run:
            return [*said, f"not sent to {repository}: a dry run"]
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            message = printable(f"{architecture}, {run.resolve().name}", 200)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{repository}: the hub refuses or is not there ({hide_secrets(reason)}); the same command goes on"
            ) from None
    return [*said, f"sent to   {commit.commit_url}"]


@torch.inference_mode()
def _same_logits(student: Path) -> str:
    """Compares logits in a process of its own, with timm alone where timm has the architecture."""
    architecture, _, pretrained = read_config(student / "config.json", REMEDY)
    load_student(student)  # which registers ours
    ours = model_entrypoint(architecture).__module__.startswith("deit_kd.")
    with tempfile.TemporaryDirectory() as temporary:
        images = torch.randn(4, *pretrained["input_size"], generator=torch.Generator().manual_seed(0))
        torch.save(images, Path(temporary) / "images.pt")
        own_file = file_of(model_entrypoint(architecture).__module__)
        own = f"import sys; sys.path.append({str(own_file.parent)!r}); import {own_file.stem}" if own_file else ""
        script = STRANGER.format(first="import deit_kd" if ours else own)
        names = [str(student.resolve()), f"{temporary}/images.pt", f"{temporary}/logits.pt"]
        done = subprocess.run([sys.executable, "-c", script, *names], cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode:
            last = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
            raise UserError(f"{student}: a clean process cannot load it ({last[:300]})")
        found = torch.load(Path(temporary) / "logits.pt", weights_only=True)
    expected = load_student(student)(images)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-5:
        raise UserError(f"{student}: a clean process computes other logits (relative difference {difference:.2g})")
    return f"reloaded  in a clean process {'with deit_kd registered' if ours else 'with timm alone'}: the same logits"


def _same_numbers(run: Path) -> str:
    """Compares the card's numbers with those that the run measured."""
    last, _ = exported(read_metrics(run), read_run(run))
    if not last:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no evaluation; give the command of the run again, which evaluates")
    prefix = "ema_" if "ema_top1" in last else ""
    file = run / "student" / "README.md"
    claimed = {each.metric_name: each.metric_value for each in _card(file, run).data.eval_results or ()}
    measured = {f"Top-{k}": round(last[f"{prefix}top{k}"], 2) for k in (1, 5)}
    if claimed != measured:
        raise UserError(f"{file}: claims {short(claimed, 200)}, the run measured {measured}; {_again(run)}")
    return f"card      top-1 {measured['Top-1']:.2f} %, top-5 {measured['Top-5']:.2f} %, as in metrics.jsonl"


def _again(run: Path) -> str:
    return f"write it again with deit-kd card {shlex.quote(str(run))}"


def _card(file: Path, run: Path) -> ModelCard:
    """The card of a student, which may have been edited.

    Raises:
        UserError: the hub cannot read its front matter.
    """
    content = read_bytes(file, _again(run), 16 * MEGABYTE)
    try:
        return ModelCard(content.decode())
    except Exception as error:  # YAML and the hub's client raise many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run / 'student' / file.name}: cannot be read as a model card ({reason}); {_again(run)}") from None


def _copy(run: Path, folder: Path) -> list[str]:
    """Copies what is published of a run into a new folder, and says what is not."""
    (folder / "plots").mkdir(parents=True)
    student, plots = run / "student", run / "plots"
    there = sorted(student.iterdir())
    sent = [file for file in there if file.name in SENT and file.is_file()]
    for file in sent:
        shutil.copyfile(file, folder / file.name)
    for file in sorted(plots.glob("*.png")):
        if file.is_file():
            shutil.copyfile(file, folder / "plots" / file.name)
    names = [f"student/{file.name}" for file in there if file not in sent]
    names += [f"plots/{file.name}" for file in sorted(plots.glob("*")) if not (folder / "plots" / file.name).exists()]
    return [f"left out  {', '.join(names)[:500]}"] if names else []


def _license(run: Path, folder: Path, license: str | None, despite_teacher: bool) -> str:
    """Sets the license in card and config, and puts its text beside them where it is Apache's."""
    facts = read_run(run)
    learned = {license_name(each["license"]) for each in (*facts["teachers"], facts.get("finetuned_from")) if each}
    card = _card(folder / "README.md", run)
    chosen = license or card.data.license
    if not isinstance(chosen, str):
        raise UserError(f"{run / 'student/README.md'}: license: is {short(chosen)}, no name of one; {_again(run)}")
    if chosen in PERMISSIVE and (foreign := sorted(learned - set(PERMISSIVE))) and not despite_teacher:
        raise UserError(
            f"--license {chosen}: this student learned from weights under {', '.join(foreign)}, which may not allow it; leave the option "
            "out, or say --despite-teacher if you may"
        )
    card.data.license = chosen
    write_text(folder / "README.md", str(card))
    config = read_json(folder / "config.json", dict[str, Any], REMEDY)
    (config.get("pretrained_cfg") or config)["license"] = chosen
    write_json(folder / "config.json", config)
    if chosen == "apache-2.0":
        shutil.copyfile(LICENSE, folder / "LICENSE")
    return f"license   {chosen}"


def _with_pictures(card: str, folder: Path) -> str:
    """The card with the plots that are uploaded beside it."""
    shown = [(file, PICTURES.get(file.stem, file.stem)) for file in sorted((folder / "plots").glob("*.png"))]
    if not shown or "](plots/" in card:
        return card
    pictures = "\n\n".join(f"![{for_markdown(title)}](plots/{quote(file.name)})" for file, title in shown)
    before, limits, after = card.partition("\n## Limits\n")
    return f"{before.rstrip()}\n\n## Curves\n\n{pictures}\n{limits}{after}"


def must_be_clean(folder: Path, run: Path) -> None:
    """Searches every file of a folder for secrets, paths and names of pictures before it is uploaded.

    Args:
        folder: all of it is published.
        run: where it was made; its path, the user's home and this installation's are looked for in binary files, too.

    Raises:
        UserError: a file holds a password, a token, a path, or the name of a picture.
    """
    names = _class_names(folder)
    here = {str(path) for path in (Path.home(), Path.cwd(), run.resolve().parent, Path(sys.prefix), LICENSE.parent)} - {"/"}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            found = _found_in(file, here, names)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{run / 'student' / file.relative_to(folder)}: cannot be looked into ({' '.join(str(error).split())[:200]}); remove it"
            ) from None
        if found:
            secrets = "; ".join(for_terminal(short(each)) for each in found[:3])
            raise UserError(
                f"{run / 'student'}: {file.relative_to(folder)} holds {secrets}, which would be published; write the card again with "
                "deit-kd card, or remove it there"
            )


def _found_in(file: Path, here: set[str], names: list[str]) -> list[str]:
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:  # after its header there are numbers alone
            header = stream.read(int.from_bytes(stream.read(8), "little") & (2**27 - 1))
        return _of_values(json.loads(header).get("__metadata__", {}), names)
    if file.suffix in (".json", ".jsonl"):
        text = file.read_text(encoding="utf-8")
        documents = (
            [json.loads(text)] if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
        return [found for each in documents for found in _of_values(each, names)]
    content = file.read_bytes()
    if b"\0" not in content[:8192]:
        text = content.decode("utf-8", "backslashreplace")
        for name in names:
            text = text.replace(name, "")
        return leaks(text)
    return [f"the path {path}" for path in sorted(here) if path.encode() in content]


def _class_names(folder: Path) -> list[str]:
    """Those that look like a path or a secret, such as /m/01g317 or user:pass@host, and may: as they are and as the card shows them."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("label_names") or []
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    texts = [name for name in (named if isinstance(named, list) else ()) if isinstance(name, str)]
    shown = {form for name in texts for form in (name, for_markdown(name, 100))}
    return sorted((name for name in shown if leaks(name)), key=len, reverse=True)


def _of_values(value: Any, names: list[str]) -> list[str]:
    """The texts of a JSON document, without the names of classes."""
    if isinstance(value, str):
        return [] if value in names else leaks(value)
    if isinstance(value, dict):
        found = [found for name, each in value.items() for found in (*_of_values(name, names), *_of_values(each, names))]
        samples = value.get("samples")
        pictures = isinstance(samples, list) and any(isinstance(each, str) for each in samples)
        return [*found, "names of pictures"] if pictures else found
    return [found for each in value for found in _of_values(each, names)] if isinstance(value, list) else []
