"""What a recipe file and an override may hold: each refusal is one line with its place, each value is what its key's type makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from deit_kd import recipe as recipes
from deit_kd.recipe import RecipeError
from fuzzing import limited

QUICKSTART = (ROOT / "recipes/quickstart/quickstart.yaml").read_text()
SEED = next(number for number, line in enumerate(QUICKSTART.splitlines(), 1) if line.startswith("seed:"))
OPTIM = QUICKSTART.splitlines().index("optim:") + 1
LINES = len(QUICKSTART.splitlines())


def seed(value: str) -> bytes:
    return QUICKSTART.replace("seed: 0", f"seed: {value}").encode()


def told(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    with pytest.raises(RecipeError) as raised, limited():
        recipes.load(file)
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (QUICKSTART.encode() + b"optim: {lr: 9}\n", f"line {LINES + 1}: 'optim' stands on line {OPTIM}, too; keep one of the two"),
        (seed("0\nseed: 0"), f"line {SEED + 1}: 'seed' stands on line {SEED}, too"),
        (QUICKSTART.replace("{patch_size: 7", "{patch_size: 7, patch_size: 8").encode(), "'patch_size' stands twice"),
        (b"a: &a [x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", "line 1: an anchor (&a); write the value out"),
        (b"seed: *a\n", "line 1: an alias (*a); write the value out"),
        (b"&a [*a]\n", "line 1: an anchor (&a)"),
        (QUICKSTART.replace("optim:", "optim:\n  <<: {lr: 1}").encode(), f"line {OPTIM + 1}: a merge key (<<); write the keys out"),
        (b"[" * 900, "line 1: more than 12 levels"),
        (b"[" * 99_000, "line 1: more than 12 levels"),
        (b"".join(b" " * n + b"a:\n" for n in range(300)), "line 13: more than 12 levels"),
        (seed("9" * 5000), f"line {SEED}: a number of 5000 digits"),
        (seed("012"), f"line {SEED}: 012 begins with 0, which some read as octal"),
        (seed(".nan"), f"line {SEED}: '.nan' is not a finite number"),
        (QUICKSTART.replace("lr: 3.0e-3", "lr: 1e999").encode(), f"line {OPTIM + 2}: '1e999' is not a finite number"),
        (QUICKSTART.replace("lr: 3.0e-3", 'lr: "nan"').encode(), "optim.lr: must be a finite number, got 'nan'"),
        (seed("2020-01-01"), "seed: must be an integer, got '2020-01-01'"),
        (seed("1:30"), "seed: must be an integer, got '1:30'"),
        (seed("0x1F"), "seed: must be an integer, got '0x1F'"),
        (seed("yes"), "seed: must be an integer, got 'yes'"),
        (seed("true"), "seed: must be an integer, got 'true'"),
        (seed("!!binary aGk="), f"line {SEED}: a tag (tag:yaml.org,2002:binary)"),
        (seed("!!python/object/apply:os.getcwd []"), f"line {SEED}: a tag (tag:yaml.org,2002:python/object/apply:os.getcwd)"),
        (seed("\x00"), f"line {SEED}: character U+0000 is not allowed in YAML"),
        (seed('"\\UFFFFFFFF"'), "not valid YAML"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\n", "not valid YAML"),
        (QUICKSTART.encode("utf-16"), "line 1: is UTF-16 or UTF-32 text; save it as UTF-8"),
        (QUICKSTART.encode("utf-32"), "line 1: is UTF-16 or UTF-32 text; save it as UTF-8"),
        (QUICKSTART.encode("utf-16-le"), "line 1: character U+0000 is not allowed"),
        (QUICKSTART.encode() + "# caf\u00e9\n".encode("latin-1"), f"line {LINES + 1}: is not UTF-8 text (perhaps Latin-1)"),
        (QUICKSTART.encode() + b"---\na: 1\n", f"line {LINES + 1}: a second document begins"),
        (QUICKSTART.replace("  lr: ", "\tlr: ").encode(), f"line {OPTIM + 2}: not valid YAML"),
        (b"[a]: 1\n", "line 1: a key that is no plain text"),
        (b"? {a: b}\n: 1\n", "line 1: a key that is no plain text"),
        (QUICKSTART.encode() + b"1: x\n", "1: unknown key"),
        (b"", "a recipe is a mapping of sections"),
        (b"null", "a recipe is a mapping of sections"),
        (b"#" * 200_000, "is 0.2 MB large, at most 0.1 MB are right"),
        (QUICKSTART.encode() + b"".join(b"k%d: 1\n" % n for n in range(9000)), "more than 20 faults"),
        (QUICKSTART.encode() + b'"a\\n\\e[31mb": 1\n', r"a\n\x1b[31mb: unknown key"),
    ],
)
def test_what_a_recipe_may_not_hold(content: bytes, fault: str, tmp_path: Path) -> None:
    message = told(tmp_path / "mine.yaml", content)
    assert fault in message
    assert "mine.yaml" in message.splitlines()[0]
    assert len(message.splitlines()) <= 22


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    absent = dict.fromkeys(("none.yaml", "n" * 5000 + ".yaml"), "does not exist")
    for name, fault in {"folder.yaml": "is no regular file", **absent}.items():
        with pytest.raises(RecipeError, match=fault):
            recipes.load(tmp_path / name)
    with pytest.raises(RecipeError, match="unknown recipe"):
        recipes.load("../quickstart")


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + QUICKSTART.encode(), QUICKSTART.replace("\n", "\r\n").encode(), b"---\n" + QUICKSTART.encode()]
)
def test_what_editors_add_is_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    assert recipes.load(tmp_path / "mine.yaml") == recipes.load("quickstart")


def test_words_text_and_booleans_in_a_file(tmp_path: Path) -> None:
    text = QUICKSTART.replace("name: quickstart_teacher", "name: 2024-05-01").replace("weights: pretrained", "weights: 1e5")
    (tmp_path / "mine.yaml").write_text(text.partition("\nrun:")[0] + "\nrun: {precision: no, fold_teacher: no, compile: off}\n")
    recipe = recipes.load(tmp_path / "mine.yaml")
    assert recipe.teacher is not None
    assert (recipe.teacher.name, recipe.teacher.weights) == ("2024-05-01", "1e5")
    assert (recipe.run.precision, recipe.run.fold_teacher, recipe.run.compile) == ("no", False, False)
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    "path",
    [
        "a #2",
        "exp: one",
        "~",
        "null",
        "2024-05-01",
        "010",
        "1e5",
        "yes",
        "[a]",
        "{a}",
        "*x",
        "!x",
        "- x",
        "|",
        "'q'",
        " x ",
        "a\nb",
        "\udcff",
    ],
)
def test_text_keys_are_text(path: str, tmp_path: Path) -> None:
    recipe = recipes.load("quickstart", [f"teacher.weights={path}"])
    assert recipe.teacher is not None
    assert recipe.teacher.weights == path
    (tmp_path / "mine.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.precision=no", "no"),
        ("seed=010", 10),
        ("optim.lr=5e-4", 5e-4),
        ("optim.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("ema_decay=null", None),
        ("teacher.cache=null", None),
        ("teacher.cache=no", "no"),
        ("run.workers=auto", "auto"),
        ("run.workers=2", 2),
        ("run.compile=no", False),
        ("run.compile=reduce-overhead", "reduce-overhead"),
        ("run.trackers=[tensorboard, 1]", ("tensorboard", "1")),
        ("augmentation.auto_augment=3a", "3a"),
        ("student.model_args.depth=2", 2),
        ("student.model_args.act_layer=gelu", "gelu"),
        ("student.model_args.qkv_bias=false", False),
        ("student.model_args.x=2020-01-01", "2020-01-01"),
        ("distill.ramp_epochs.kd=5", 5.0),
    ],
)
def test_a_value_is_what_its_key_asks_for(override: str, value: object) -> None:
    assert dict(recipes.flatten(recipes.load("quickstart", [override])))[override.partition("=")[0]] == value


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("teacher.weights=", "teacher.weights: must be text, got None"),
        ("seed=0x10", "seed: must be an integer, got '0x10'"),
        ("seed=1:30", "seed: must be an integer, got '1:30'"),
        ("seed=true", "seed: must be an integer, got 'true'"),
        ("seed=" + "9" * 5000, "a number of 5000 digits"),
        ("optim.lr=.inf", "'.inf' is not a finite number"),
        ("optim.betas=[0.9", "optim.betas: '[0.9' cannot be read"),
        ("student.model_args.x=*a", "an alias (*a)"),
        ("student.model_args.x=!!python/name:os.system", "a tag"),
        ("teacher={name: a, name: b}", "'name' stands twice"),
        ("seed=1\n---\n2", "a second document begins"),
        ("teachers.0.name=x", "cannot be set, because teachers is null"),
        ("optim.learning_rate=1e-3", "optim.learning_rate: unknown key in an override (did you mean optim.lr?)"),
        ("batch_size=3", "(did you mean global_batch_size?)"),
        ("num_epochs=3", "(did you mean epochs?)"),
        ("epochs=1000001", "epochs: must be at most 1,000,000"),
    ],
)
def test_overrides_that_are_refused(override: str, fault: str) -> None:
    with pytest.raises(RecipeError) as raised, limited():
        recipes.load("quickstart", [override])
    head, *faults = str(raised.value).splitlines()
    assert "1 fault" in head
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        (["distill.feature_loss=norm_direction"], ["distill.class_means: missing; feature_loss=norm_direction reads it"]),
        (["distill.feature_loss=norm_direction", "distill.class_means=auto"], []),
        (["projector.kind=orthonormal"], []),
        (["projector.kind=orthonormal", "projector.bias=true"], ["projector.bias: nothing reads it with kind=orthonormal"]),
        (["optim.schedule=multistep", "optim.milestones=[3]", "optim.decay_rate=0.1"], []),
        (["optim.name=momentum", "optim.momentum=0.9"], []),
        (["distill.kd_loss=hard_distillation"], []),
    ],
)
def test_a_choice_drops_what_only_the_choice_before_read(overrides: list[str], faults: list[str]) -> None:
    try:
        recipes.load("quickstart", overrides)
        found = []
    except RecipeError as error:
        found = str(error).splitlines()[1:]
    assert len(found) == len(faults)
    for fault, expected in zip(found, faults, strict=True):
        assert expected in fault


def test_faults_that_are_told_beside_a_wrong_type_are_real() -> None:
    """No value is borrowed: what depends on the wrong one is left out, what does not is listed."""
    with pytest.raises(RecipeError) as raised:
        recipes.load("deit_ti_two_stages", ["distill.kd_loss=none", "epochs=3.5", "optim.min_lr=-1", "data.img_size=30"])
    found = str(raised.value).splitlines()[1:]
    assert sorted(fault.split(":")[0].strip() for fault in found) == ["data.img_size", "distill.kd_loss", "epochs", "optim.min_lr"]


def test_an_installed_package_without_recipes_tells_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "none")
    message = told(tmp_path / "mine.yaml", QUICKSTART.replace("epochs: 10", "epochs: ten").encode())
    assert message == "recipe mine.yaml: 1 fault\n  epochs: must be an integer, got 'ten'"


def test_a_run_folder_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.load("quickstart", ["epochs=7"])))
    assert recipes.load(tmp_path).epochs == 7
