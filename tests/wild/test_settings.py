"""Settings are typed: what is none is refused in one line before anything is loaded, and names and paths stay texts."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ud2m.cli import commands, pages, words
from ud2m.cli.objects import build, resolved
from ud2m.cli.pages import label, part
from ud2m.cli.sample import changed_operator
from ud2m.cli.settings import COMMANDS, check
from ud2m.cli.words import entry_words, quoted, readable
from ud2m.names import fits, made
from ud2m.physics import GaussianBlur, OperatorFamily
from ud2m.priors.latent import LatentPrior
from ud2m.priors.prior import LoraSpec

CONF = REPOSITORY / "conf"


def said(capsys, *arguments: str) -> str:
    """Return the one line that a command refuses its words with."""
    with patch.object(sys, "argv", ["ud2m", *arguments]), pytest.raises(SystemExit) as stopped:
        commands.start()
    HydraConfig.instance().cfg = None  # of this call; it would pass for that of the next one in this process
    written = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert len(written) == 1, written
    assert written[0].startswith("error: ")
    return written[0].removeprefix("error: ")


def composed(command: str, *given: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, readable(command, given, CONF))


# the first part of a message names the key
REFUSED = {
    "sample": [
        *("seed=abc", "seed=null", "seed=1.5", "seed=-1", "seed=true", "show=abc", "show=-1", "tile=abc", "tile=1"),
        *("sigma_y=[0.1]", "sigma_y=nan", "sigma_y=inf", "sigma_y=1e30", "sigma_y=true", "device=tpu", "device=null"),
        *("crop=abc", "crop=0", "eta=true", "eta=-0.1", "eta=nan", "step_scale=1e30", "step_scale=0", "output=null"),
        *("num_samples=1e9", "num_samples='8'", "symmetries=true", "symmetries=3", "overwrite=abc", "degraded=2"),
        *("input=", "input=''", "model=null", "lpips=none", "precision=double", "chunk_size=null", "methods=[pinv]"),
        *("tune_samples=0", "num_steps=2.0", "grid_power=0", "compare=null", "prior=''"),
    ],
    "train": [
        *("steps=abc", "steps=0", "steps=2.5", "accumulate=true", "checkpoint_every=abc", "checkpoint_every=0"),
        *("resume=maybe", "estimate=2", "device_tflops=0", "device_tflops=abc", "seed=abc", "run_dir=''", "prior=''"),
        *("give_up_after=-1", "export=''", "validate_every=null"),
    ],
    "evaluate": [
        *("methods=null", "methods=[]", "methods=pinv", "operators=[1]", "datasets=['']", "metrics=null"),
        *("unsupported=maybe", "tune=abc", "tune_images=0", "reference=''", "seed=abc", "show=abc", "name=''"),
    ],
}


@pytest.mark.parametrize(("command", "word"), [(command, word) for command, cases in REFUSED.items() for word in cases])
def test_values_of_another_kind_are_refused_by_their_key(command, word):
    page = OmegaConf.to_container(OmegaConf.load(CONF / f"{command}.yaml"))
    fields = COMMANDS[command].model_fields
    groups = {key: {} for key in ("data", "training", "trainer", "logger") if key in fields}
    groups |= {"methods": {} if command == "sample" else ["pinv"]}
    config = OmegaConf.create({key: value for key, value in (page | groups).items() if key in fields})
    for name in {"output", "run_dir", "name"} & set(fields):
        config[name] = "x"
    check(config, COMMANDS[command])
    key = word.partition("=")[0]
    config[key] = words._PARSER.parse_override(word).value() if not word.endswith(("=", "''")) else ""
    if hasattr(config[key], "text"):
        config[key] = config[key].text
    with pytest.raises(ValueError, match=rf"^{key} must be .*, got") as error:
        check(config, COMMANDS[command])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [("overwrite=no", False), ("overwrite=Off", False), ("overwrite=yes", True), ("overwrite=true", True),
     ("sigma_y=1", 1.0), ("sigma_y=auto", "auto"), ("eta=fresh", "fresh"), ("eta=0", 0), ("tile=null", None)],
)  # fmt: skip
def test_values_that_are_some(word, value):
    config = composed("sample", word)
    check(config, COMMANDS["sample"])
    assert config[word.partition("=")[0]] == value


def test_no_does_not_replace_results(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".ud2m").touch()
    (tmp_path / "out" / "metrics.json").touch()
    assert "overwrite=true" in said(capsys, "sample", "overwrite=no", f"output={tmp_path / 'out'}")


@pytest.mark.parametrize(
    "name",
    ["2024_01_05", "1e5", "true", "été (1), a=b #2.png", "it's.png", "a,b", "[x]", "{y}", "back\\slash", "end\\", 'q"q',
     "a'b\\'c", "x:y", "~tilde", "日本"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["input", "data.root", "++data.root"])
def test_names_and_paths_stay_what_they_are(key, name):
    config = (
        composed("sample", f"{key}={name}") if key == "input" else composed("sample", "data=folder", f"{key}={name}")
    )
    assert OmegaConf.select(config, key.lstrip("+")) == name


def test_what_is_quoted_already_or_swept_stays():
    assert quoted("input='a b'") == "input='a b'"
    assert quoted("prior=a,b", sweeps=True) == "prior=a,b"
    assert quoted("prior=a,b") == "prior='a,b'"
    assert quoted("prior=null") == "prior=null"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "sead=3"], "unknown key 'sead' (did you mean seed?); known: "),
        (["train", "run_dir=null"], "While dereferencing interpolation '${run_dir}': Incompatible value 'None'"),
        (["train", "+sead=3"], "unknown key 'sead' (did you mean seed?); known: "),
        (["train", "width=2"], "unknown key 'width' (did you mean physics.operator.width?)"),
        (["train", "physics.operator.widht=2"],
         "unknown key 'physics.operator.widht' (did you mean physics.operator.width?); known in physics.operator: "),
        (["train", "training.optimiser.lr=1"], "(did you mean training.optimizer.lr?); known in training: "),
        (["train", "+physics.strength=1"], "unknown addition to physics 'strength'; known: operator, "),
        (["sample", "physics=gausian_blur"], "unknown physics 'gausian_blur' (did you mean gaussian_blur?)"),
        (["sample", "physics=3"], "physics must be the name of a page, got '3'"),
        (["train", "data=[1,2]"], "data must be the name of a page, got '[1,2]'"),
        (["train", "network={a:1}"], "network must be the name of a page, got '{a:1}'"),
        (["train", "experiment=dmo"], "unknown experiment 'dmo' (did you mean demo?)"),
        (["sample", "+seed=3"], "seed is there already"),
        (["sample", "num_samples=2,3"], "num_samples has several values"),
        (["sample", "nothing"], "'nothing' is no setting"),
        (["sample", "eta=(("], "'eta=((' cannot be read"),
        (["evaluate", "methods=[pinv,'start label=\"A^dagger y\"']"], "methods need labels of their own"),
        (["evaluate", "methods=[pinv,pinv]"], "methods must name none twice"),
        (["evaluate", "operators=['gaussian_blur operator.widht=2']"], "(did you mean operator.width?)"),
        (["evaluate", "operators=['kernel kernel=\"a']"], "No closing quotation"),
    ],
    ids=lambda part: part[1] if isinstance(part, list) else "",
)  # fmt: skip
def test_names_that_are_not_there_are_told_the_nearest_one(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = said(capsys, *arguments)
    assert message in line
    assert "+sead" not in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_entries_of_evaluations_have_blanks_in_quotes():
    assert entry_words("""kernel kernel="my file (1).png" sigma_y=0.1""")[1] == "kernel=my file (1).png"
    assert label("ud2m label='My own: method'", "UD2M") == "My own: method"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert part("physics", "kernel kernel='my file, (1).png'")["kernel"] == "my file, (1).png"
        assert part("data", "folder root=2024_01_05")["root"] == "2024_01_05"


@pytest.mark.parametrize(
    ("steps", "page", "follows"), [(10, 500, 10), (1200, 500, 600), (1000, 500, 500), (997, 500, 997)]
)
def test_validations_follow_the_steps(steps, page, follows, monkeypatch, capsys):
    monkeypatch.setattr(pages, "given_words", lambda: [f"steps={steps}"])
    config = OmegaConf.create({"steps": steps, "validate_every": page})
    pages.follow_steps(config)
    assert config.validate_every == follows
    assert steps % follows == 0
    monkeypatch.setattr(pages, "given_words", lambda: [f"steps={steps}", f"validate_every={page}"])
    config = OmegaConf.create({"steps": steps, "validate_every": page})
    pages.follow_steps(config)
    assert config.validate_every == page


# --- parts, whose classes say what they take ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [({"width": "abc"}, r"^physics\.operator\.width must be a number or a list, got 'abc'$"),
     ({"width": True}, r"^physics\.operator\.width must be a number or a list, got true$"),
     ({"width": [1, "a"]}, r"^physics\.operator\.width must be"),
     ({"width": float("nan")}, r"^physics\.operator\.width is no number"),
     ({"widht": 1}, r"unknown argument of GaussianBlur 'widht' \(did you mean width\?\)"),
     ({"boundary": 3}, r"^physics\.operator\.boundary must be a text, got 3$")],
)  # fmt: skip
def test_arguments_of_classes_have_the_types_of_their_hints(values, message):
    node = {"_target_": "ud2m.physics.GaussianBlur", "width": 1.0, **values}
    with pytest.raises(ValueError, match=message):
        build(node, "physics.operator", OperatorFamily)


def test_types_are_those_of_parents_too():
    node = {"_target_": "ud2m.data.PhotoData", "crop_size": "abc", "batch_size": 2, "samples_per_epoch": 2}
    with pytest.raises(ValueError, match=r"data\.crop_size must be a whole number, got 'abc'"):
        build(node, "data")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [(1, float, True), (True, float, False), ("1", int, False), (1.0, int, False), ([1, 2], tuple[int, int], True),
     ([1], tuple[int, int], False), ("x", Path, True), (None, int | None, True), (3, GaussianBlur, False)],
)  # fmt: skip
def test_plain_values_and_hints(value, hint, expected):
    assert fits(value, hint) == expected


def test_descriptions_are_typed_like_classes():
    with pytest.raises(ValueError, match=r"^lora\.rank must be a whole number, got 'abc'$"):
        made(LoraSpec, {"rank": "abc"}, "lora")
    with pytest.raises(ValueError, match="x lacks hint"):
        made(fits, {"value": 1}, "x")


# --- the model's own operator ---------------------------------------------------------------------------------


def test_settings_of_the_operator_without_its_name_are_those_of_the_model():
    config = composed("sample", "physics.operator.width=2.0", "physics.sigma_y=0.03")
    trained = {"operator": {"class": "ud2m.physics.GaussianBlur", "width": 1.6, "angle": 0.0}, "sigma_y": 0.01}
    changed = changed_operator(trained, config.physics)
    assert changed == {"operator": {**trained["operator"], "width": 2.0}, "sigma_y": 0.03}
    with pytest.raises(ValueError, match="did you mean operator"):
        changed_operator(trained, {"operater": {}})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("latino", "times", 5.0),
        ("latino", "steps", "abc"),
        ("latino", "correction", 8),
        ("latino_pro", "optimizer", -1.0),
        ("latino_pro", "candidates", [1, "a"]),
        ("latino_pro", "fixed", True),
        ("latino_scores", "candidates", 3.0),
        ("lvtino", "image_prompt", 7),
        ("lvtino", "window", "abc"),
        ("vision_xl", "eta", [1.0]),
    ],
)
def test_what_a_sampler_hands_on_to_its_class_is_typed_before_its_pipeline_is_loaded(name, key, value, monkeypatch):
    monkeypatch.setattr(LatentPrior, "from_pretrained", lambda *_, **__: pytest.fail("a pipeline was loaded"))
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("sample", [f"sampler={name}", "prompt=a"])
    page = {part: resolved(OmegaConf.select(config, f"sampler.{part}")) for part in config.sampler}
    with pytest.raises(ValueError, match=rf"sampler\.{key} must be .*, got "):
        build(page | {key: value}, "sampler")
