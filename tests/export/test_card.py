"""Model cards: names of others as they are, no secret and no path, and what is said of the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from torch import zeros

from deit_kd import recipe as recipes
from deit_kd import text
from deit_kd.errors import UserError
from deit_kd.export import write_card
from deit_kd.export.card import student_in_words
from deit_kd.export.citations import PAPERS, bibtex, cited
from deit_kd.export.publish import must_be_clean
from deit_kd.export.student import license
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES
from deit_kd.training.run_files import plain
from nasty import NASTY, markdown
from sections import citing, evaluating, naming

TEACHER = {
    "name": "quickstart_teacher", "weights": "pretrained", "sha256": "0" * 64, "license": "apache-2.0", "parameters": 10, "gmacs": 0.1,
    "num_classes": 2, "label_names": None, "img_size": 28, "cache": None,
}  # fmt: skip
RUN: dict[str, Any] = {
    "name": "run", "deit_kd": "0.1.0", "command": "python train.py --recipe quickstart", "commit": "unknown", "versions": {"torch": "2"},
    "hardware": "CPU, 2 cores (x86_64)", "earlier_sessions": [], "precision": "no", "augmented_on": "cpu", "decoded_on": "workers",
    "processes": 1, "sharded": False, "accumulation_steps": 2, "micro_batch_size": 1, "global_batch_size": 2, "total_steps": 4,
    "data": {"name": "images of 2 classes in folders", "train_images": 4, "val_images": 2, "num_classes": 2},
    "student": {"parameters": 5, "gmacs": 0.1}, "finetuned_from": None, "held_out_images": 0, "projector_parameters": 3,
    "teachers": [TEACHER],
}  # fmt: skip
EVALUATION = {"kind": "eval", "step": 4, "epoch": 1.0, "images": 2, "top1": 50.0, "top5": 100.0, "nll": 0.5, "seconds": 3600.0}


def make_run(
    folder: Path, labels: list[str], overrides: tuple[str, ...] = (), recipe: str = "quickstart", lines: Any = (), **run: Any
) -> Path:
    (folder / "student").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipes.dump(recipes.load(recipe, overrides)))
    (folder / "run.json").write_text(json.dumps(plain(RUN | run)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, EVALUATION)))
    (folder / "student/config.json").write_text(json.dumps({"label_names": labels, "architecture": "x"}))
    save_file({"a": zeros(1)}, folder / "student/model.safetensors")
    return folder


def change(told: str) -> dict[str, Any]:
    """What run.json says of a change that its user accepted."""
    return {"key": "data.train_images", "was": 1, "now": 2, "told": told, "step": 2}


def card_of(folder: Path) -> str:
    return write_card(folder).read_text(encoding="utf-8")


def rows(card: str) -> dict[str, str]:
    """The first two cells of each row of each table."""
    cells = [line.split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[1].removesuffix(" |") for row in cells if len(row) == 2}


@pytest.mark.parametrize(
    ("stated", "front", "shown"),
    [
        ("mit", "apache-2.0", "mit"),
        (["mit"], "apache-2.0", "mit"),
        (["cc-by-nc-4.0", "mit"], "other", "cc-by-nc-4.0, mit"),
        ({"name": "cc-by-4.0", "link": "x"}, "cc-by-4.0", "cc-by-4.0"),
        ({"a": 1}, "other", "unknown"),
        (7, "other", "unknown"),
        (None, "other", "unknown"),
        ("see [here](http://evil.test) | <b>", "other", r"see \[here\](http\://evil.test) \| &lt;b&gt;"),
        ("a\nlicense: mit\nb", "other", r"a license: mit b"),
    ],
)
def test_a_license_of_any_type(stated: object, front: str, shown: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["cat", "dog"], teachers=[TEACHER | {"license": stated}])
    card = card_of(folder)
    assert ModelCard(card).data.license == front == license([stated])
    assert f"| License | {shown} |" in card


@pytest.mark.parametrize("number", range(0, len(NASTY), 9))
def test_names_of_others_in_a_card(number: int, tmp_path: Path) -> None:
    """Every nasty name as a class, and some of them in every other place."""
    name, other = NASTY[number], NASTY[-number]
    folder = make_run(
        tmp_path,
        NASTY[:100],
        name=other,
        teachers=[TEACHER | {"name": name, "license": name, "weights": other}],
        data=RUN["data"] | {"name": name},
        finetuned_from={"source": other, "sha256": "1" * 64, "license": name},
        accepted_changes=[change(name)],
        commit=name,
        hardware=other,
    )
    card = card_of(folder)
    card.encode()
    plain = card_of(
        make_run(folder, ["cat", "dog"], finetuned_from=RUN["teachers"][0] | {"source": "x"}, accepted_changes=[change("x")])
    )
    kinds = [[token.type for token in markdown.parse(each.partition("\n---\n")[2])] for each in (card, plain)]
    assert kinds[0] == kinds[1], "a name became markup"
    inline = [child.type for token in markdown.parse(card.partition("\n---\n")[2]) for child in token.children or []]
    assert not {"link_open", "html_inline", "image", "s_open"} & set(inline)
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "image-classification"
    assert ModelCard(card).data.eval_results


def test_class_names_are_listed_as_they_are(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [os.fsdecode(b"caf\xe9"), "T-shirt/top"])
    assert r"| Classes | caf\\udce9, T-shirt/top |" in card_of(folder)


def test_no_secret_and_no_path_in_what_is_published(tmp_path: Path) -> None:
    """As an earlier version stored them."""
    weights = "/home/anna/secret project/x.pth"
    folder = make_run(
        tmp_path,
        ["cat", "dog"],
        (f"teacher.weights={weights}", "teacher.name=/home/anna/teacher/student", "distill.class_means=null"),
        lines=[{"kind": "skipped", "step": 1, "terms": ["kd"], "samples": ["/home/anna/photos/me.png"], "seconds": 1.0}],
        command="python train.py --data https://anna:PASSWORD@h.test/a?token=TOKEN teacher.weights=/home/anna/x.pth hf_abcDEF123456",
        teachers=[TEACHER | {"name": "/home/anna/teacher/student", "weights": weights}],
        finetuned_from={"source": "runs/of anna/student", "sha256": None, "license": "mit"},
    )
    card = card_of(folder)
    published = "".join(file.read_text() for file in (folder / "student").iterdir() if file.suffix != ".safetensors")
    for word in ("anna", "PASSWORD", "TOKEN", "hf_abc", "me.png", "secret project"):
        assert word not in published, word
    for part in ("**.../student**", "| Weights | .../x.pth |", "--data https://h.test/a teacher.weights=.../x.pth ..."):
        assert part in card, part
    assert recipes.load(folder / "student/recipe.yaml").teacher.weights == ".../x.pth"  # type: ignore[union-attr]
    assert recipes.load(folder / "recipe.yaml").teacher.weights == weights, "the run can go on"  # type: ignore[union-attr]
    must_be_clean(folder / "student", folder)


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("README.md", b"from /home/anna/photos", "/home/anna/photos"),
        ("README.md", b"https://a:b@h.test/", "a password, a token, or a URL"),
        ("recipe.yaml", b"a: hf_abcDEF123456789", "a password, a token"),
        ("notes.txt", rb"C:\Users\anna\x.png", r"C:\\Users\\anna"),
        ("config.json", b'{"a": [{"file": "\\u002fhome\\u002fanna"}]}', "/home/anna"),
        ("metrics.jsonl", b'{"step": 1}\n{"samples": ["me.png"]}\n', "names of pictures"),
        ("metrics.jsonl", b"{", "cannot be looked into"),
        ("model.onnx", b"\0\1" + str(Path.home()).encode() + b"/x.py", "the path"),
        ("plots/x.png", b"\x89PNG\0" + str(Path.cwd()).encode(), "the path"),
    ],
)
def test_what_publish_refuses(file: str, content: bytes, found: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ["cat", "dog"])
    write_card(folder)
    must_be_clean(folder / "student", folder)
    (folder / "student" / file).parent.mkdir(exist_ok=True)
    (folder / "student" / file).write_bytes(content)
    with pytest.raises(UserError) as refused:
        must_be_clean(folder / "student", folder)
    assert found in str(refused.value)
    assert Path(file).name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_classes_may_be_called_like_a_path(tmp_path: Path) -> None:
    """As those of Open Images."""
    folder = make_run(tmp_path, ["/m/01g317", "/m/0_x|y"])
    assert "/m/01g317" in card_of(folder)
    must_be_clean(folder / "student", folder)


def test_tensors_may_hold_anything_but_their_header_may_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["cat", "dog"])
    save_file({"a": zeros(1)}, folder / "student/model.safetensors", {"from": "/home/anna/x.pth"})
    with pytest.raises(UserError, match=r"model\.safetensors holds '/home/anna/x\.pth'"):
        must_be_clean(folder / "student", folder)


def test_every_loss_has_a_paper() -> None:
    rows = {**LOGIT_OBJECTIVES, **FEATURE_OBJECTIVES}.values()
    assert {row.paper for row in rows} | {"beyer2022knowledge"} == set(PAPERS)
    for key in PAPERS:
        entry = bibtex(key)
        assert entry.count("{") == entry.count("}")
        assert entry.startswith(("@article{", "@inproceedings{"))


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("quickstart", ["miles2024understanding", "hinton2015distilling", "touvron2021training"]),
        ("quickstart_alone", ["touvron2021training"]),
        ("deit_ti_vkd", ["miles2024vkd", "hinton2015distilling", "touvron2021training"]),
        ("deit_ti_nd", ["wang2023improving", "touvron2021training"]),
        ("deit_ti_cskd", ["zhao2023cumulative", "touvron2021training"]),
        ("deit_ti_nkd", ["yang2023knowledge", "touvron2021training"]),
        ("deit_ti_funmatch", ["hinton2015distilling", "beyer2022knowledge", "touvron2021training"]),
    ],
)
def test_a_card_cites_what_its_recipe_uses(recipe: str, keys: list[str]) -> None:
    assert cited(*citing(recipes.load(recipe))) == keys


def test_every_recipe_cites_its_losses() -> None:
    names = {"dkd": "zhao2022decoupled", "dist": "huang2022knowledge", "crd": "tian2020contrastive", "at": "zagoruyko2017paying"}
    names |= {"cc": "peng2019correlation", "fitnet": "romero2015fitnets", "reviewkd": "chen2021distilling"}
    seen = set()
    for recipe in recipes.names():
        loss = recipe.removeprefix("cifar100_")
        if loss in names:
            seen.add(loss)
            keys = cited(*citing(recipes.load(recipe)))
            assert names[loss] in keys
            assert not {"miles2024understanding", "wang2023improving", "touvron2021training"} & set(keys), recipe
    assert seen == set(names)


def test_a_card_says_what_is_so(tmp_path: Path) -> None:
    card = card_of(
        make_run(tmp_path, ["cat", "dog"], ("data.img_size=64", "evaluation.crop_pct=0.9", "student.model_args.patch_size=8"))
    )
    told = rows(card)
    assert told["Precision"] == "float32"
    assert told["Global batch"] == "2 = 1 process x 2 micro-batches x 1 image"
    assert told["Evaluation"] == ("bilinear resize of the shorter side to floor(64 / 0.9) = 71 pixels, then the central 64 x 64")
    assert "images of images" not in card
    assert "On 2 validation images (images of 2 classes in folders), each counted once." in card
    assert "# run: deit_distilled of width 96, depth 4, patches of 8 px, images of 64 px\n" in card
    assert "Changed at step" not in card
    changed = card_of(make_run(tmp_path, ["cat"], accepted_changes=[change("3 | x")]))
    assert r"| Changed at step 2 | 3 \| x: the run went on, not bit for bit as without the change |" in changed


def test_the_rounding_of_the_card_is_timms(tmp_path: Path) -> None:
    from deit_kd.data.transforms import evaluation_transform

    for size, share in ((64, 0.9), (224, 0.875), (32, 0.95), (28, 1.0)):
        overrides = (f"data.img_size={size}", f"evaluation.crop_pct={share}", f"student.model_args.patch_size={size // 4}")
        folder = make_run(tmp_path / str(size), ["cat", "dog"], overrides)
        transform: Any = evaluation_transform(*evaluating(recipes.load(folder / "recipe.yaml")))
        (resize,) = [step for step in transform.transforms if type(step).__name__ == "Resize"]
        pixels = resize.size if isinstance(resize.size, int) else resize.size[0]
        assert f"= {pixels} pixels, then the central {size} x {size}" in card_of(folder)


def test_a_title_says_what_the_student_is() -> None:
    assert student_in_words(*naming(recipes.load("deit_ti"))).startswith("deit_tiny_convstem_distilled")
    assert student_in_words(*naming(recipes.load("deit_ti"))).endswith("_224")
    assert (
        student_in_words(*naming(recipes.load("deit_ti", ["data.img_size=32"])))
        == "deit_tiny_convstem_distilled_patch16, images of 32 px"
    )
    assert (
        student_in_words(*naming(recipes.load("quickstart")))
        == "deit_distilled of width 96, depth 4, patches of 7 px, images of 28 px"
    )


def test_markdown_parser_is_as_strict_as_it_must_be() -> None:
    """The tests above would see what they look for."""
    parser = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    kinds = {child.type for token in parser.parse("[a](b) <b> ~~c~~ ![d](e)") for child in token.children or []}
    assert {"link_open", "html_inline", "image", "s_open"} <= kinds
    assert text.for_markdown("[a](b) <b>") not in ("[a](b) <b>",)
