"""Students as ONNX, torch.export programs, and in half precision; cards written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import nn

import deit_kd
from conftest import ROOT
from deit_kd.cli import main
from deit_kd.export import formats

ARGUMENTS = {"patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(
    params=[
        "deit_tiny_distilled_patch16_224",
        "deit_tiny_two_teachers_patch16_224",
        "deit_tiny_convstem_distilled_patch16_224",
        "resnet10t",
    ]
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    arguments = {} if request.param == "resnet10t" else {**ARGUMENTS, "patch_size": 14}
    sized = {} if request.param == "resnet10t" else {"img_size": 56}
    student = timm.create_model(request.param, num_classes=5, **arguments, **sized).eval()
    data = {"input_size": [3, 56, 56]}
    save_for_hf(
        student,
        tmp_path / "student",
        model_args={**arguments, **sized},
        model_config={"pretrained_cfg": data},
        safe_serialization=True,
    )
    return tmp_path / "student"


@torch.inference_mode()
@pytest.mark.slow
def test_programs_take_any_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    images = torch.randn(7, 3, 56, 56)
    expected = deit_kd.load_student(folder)(images)
    main(["export", str(folder), "--format", "onnx"])
    main(["export", str(folder), "--format", "torch-export"])
    assert capsys.readouterr().out.count("logits differ by") == 2
    for file in ("model.onnx", "model.pt2"):
        content = (folder / file).read_bytes()
        for word in ("site-packages", str(ROOT), str(Path.home()), ".py"):
            assert f"{word}".encode() not in content, f"{file} tells where this machine keeps Python"
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(folder / "model.pt2").module()
    for part in (slice(0, 1), slice(0, 7)):
        (found,) = session.run(None, {"images": images[part].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[part], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program(images[part]), expected[part], rtol=1e-4, atol=1e-5)
    written = (folder / "model.onnx").stat().st_mtime_ns
    main(["export", str(folder), "--format", "onnx"])
    assert "model.onnx: is there already, whole; logits differ by" in capsys.readouterr().out
    assert (folder / "model.onnx").stat().st_mtime_ns == written
    (folder / "model.pt2").write_text("of others")
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--format", "torch-export"])
    assert "is there already, and is not what this command makes" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_the_bytes(kind: str, folder: Path) -> None:
    main(["export", str(folder), "--format", kind])
    halved = folder.with_name(f"student_{kind}")
    tensors = load_file(halved / "model.safetensors")
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {
        getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[kind])
    }
    assert (halved / "model.safetensors").stat().st_size < 0.55 * (folder / "model.safetensors").stat().st_size
    assert next(deit_kd.load_student(halved).parameters()).dtype == torch.float32


def test_other_logits_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Noise(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 5)

    monkeypatch.setattr(formats, "_halved", lambda *_: Noise())
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--format", "fp16"])
    assert "gives other logits than the student" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--format", "onnx"])
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_a_card_needs_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["card", str(folder)])
    assert "is no run that came to its end" in capsys.readouterr().err
