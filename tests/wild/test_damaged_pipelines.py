"""Folders of pipelines whose files are damaged, foreign or contradict each other: one line each, before sampling."""

import json
import shutil

import pytest
import tiny_latent
import torch
from safetensors.torch import load_file, save_file

from ud2m.priors.latent import MADE_BY, LatentPrior, NoiseTable
from ud2m.priors.pipelines import load_vae
from ud2m.priors.prior import LoraSpec

NETWORKS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
KINDS = {"sd": ("unet", "vae", "text_encoder"), "wan": ("transformer", "vae", "text_encoder")}
PARTS = [
    pytest.param(kind, part, marks=[pytest.mark.slow] * (kind == "wan"))
    for kind, parts in KINDS.items()
    for part in parts
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of whole pipelines by kind."""
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, folder in folders.items():
        (tiny_latent.wan() if kind == "wan" else tiny_latent.pipeline(kind)).save_pretrained(folder)
    return folders


@pytest.fixture
def folder(whole, tmp_path):
    """A function that copies a whole folder, to be damaged."""
    return lambda kind="sd": shutil.copytree(whole[kind], tmp_path / "pipeline")


def first(state):
    """Return the name of a weight in the middle of a network."""
    return next(name for name in sorted(state) if name.endswith("weight") and state[name].ndim > 1)


def missing(state):
    del state[first(state)]


def renamed(state):
    state[f"x.{first(state)}"] = state.pop(first(state))


def further(state):
    state["further.weight"] = torch.zeros(2, 2)


def not_a_number(state):
    state[first(state)].view(-1)[0] = float("nan")


def whole_numbers(state):
    for name in state:
        state[name] = state[name].to(torch.int32)


def complex_numbers(state):
    state[first(state)] = state[first(state)].to(torch.complex64)


def of_other_shape(state):
    state[first(state)] = state[first(state)][:-1].clone()


def rewritten(file, damage):
    state = load_file(file)
    damage(state)
    save_file(state, file, {"format": "pt"})


def changed(file, **options):
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def refused(call, *words):
    """Ask for one line that holds all words, whatever of them is a pattern."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


def test_whole_folders_load(whole):
    for kind, folder in whole.items():
        prior = LatentPrior.from_pretrained(folder)
        made = tiny_latent.wan() if kind == "wan" else tiny_latent.pipeline(kind)
        assert prior.fingerprint == LatentPrior(made).fingerprint


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part"), PARTS)
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (missing, "missing_keys"),
        (renamed, "unexpected_keys"),
        (further, "unexpected_keys"),
        (not_a_number, "holds NaN or infinity"),
        (whole_numbers, "weights are floats"),
        (complex_numbers, "weights are floats"),
        (of_other_shape, ""),
    ],
)
def test_weights_that_are_not_those_of_the_network_are_refused(kind, part, damage, word, folder):
    place = folder(kind)
    rewritten(place / part / NETWORKS[part], damage)
    refused(lambda: LatentPrior.from_pretrained(place), word, f"{place}/{part}")
    if part == "vae" and damage is not of_other_shape:
        refused(lambda: load_vae(str(place)), word, f"{place}/vae")
        refused(lambda: load_vae(str(place / "vae")), word, f"{place}/vae")


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_cut_and_lost_weights_name_their_part(kind, part, folder):
    place = folder(kind)
    file = place / part / NETWORKS[part]
    file.write_bytes(file.read_bytes()[:-100])
    refused(lambda: LatentPrior.from_pretrained(place), f"cannot load the weights of {place}/{part}")
    file.unlink()
    refused(lambda: LatentPrior.from_pretrained(place), f"cannot load the weights of {place}/{part}")


@pytest.mark.slow
def test_weights_in_files_of_torch_are_looked_at_too(folder):
    place = folder()
    file = place / "vae" / NETWORKS["vae"]
    state = load_file(file)
    file.unlink()
    torch.save(state, place / "vae" / "diffusion_pytorch_model.bin")
    assert LatentPrior.from_pretrained(place).fingerprint == LatentPrior(tiny_latent.pipeline("sd")).fingerprint
    whole_numbers(state)
    torch.save(state, place / "vae" / "diffusion_pytorch_model.bin")
    refused(lambda: LatentPrior.from_pretrained(place), "diffusion_pytorch_model.bin holds int32; weights are floats")


# --- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '"a"', ""])
@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
def test_json_that_is_no_object_names_its_file(file, text, folder):
    place = folder()
    (place / file).write_text(text)
    refused(lambda: LatentPrior.from_pretrained(place), f"{place / file}")
    refused(lambda: LatentPrior.on_meta(str(place)), f"{place / file}")


@pytest.mark.parametrize("text", ["[1]", "{", "{}", '{"model": 3}'])
def test_a_damaged_tokenizer_is_one_line(text, folder):
    place = folder()
    (place / "tokenizer" / "tokenizer.json").write_text(text)
    refused(lambda: LatentPrior.from_pretrained(place), f"{place} cannot be loaded by diffusers")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"_class_name": "os.system"}, "names no pipeline of diffusers, but 'os.system'"),
        ({"_class_name": ["pipeline", "Evil"]}, "names no pipeline of diffusers"),
        ({"_class_name": "UNet2DModel"}, "names no pipeline of diffusers"),
        ({"unet": ["antigravity", "Evil"]}, "for unet; allowed are classes of diffusers, transformers"),
        ({"unet": ["evil", "Evil"]}, "for unet; allowed are classes of diffusers, transformers"),
        ({"vae": ["DiffusionPipeline", "download"]}, "for vae; allowed are classes of diffusers, transformers"),
        ({"vae": ["diffusers"]}, "for vae; allowed are classes of diffusers, transformers"),
        ({"vae": ["diffusers", 3]}, "for vae; allowed are classes of diffusers, transformers"),
        ({"unet": ["diffusers", "Nothing"]}, "without unet or transformer"),
        ({"unet": ["diffusers", "AutoencoderKL"]}, "unet"),
        ({"text_encoder": [None, None]}, "without text_encoder"),
    ],
)
def test_an_index_chooses_among_known_classes_alone(entry, word, folder, monkeypatch):
    place = folder()
    (place / "unet" / "evil.py").write_text("raise SystemExit('this ran')\n")
    (place / "evil.py").write_text("raise SystemExit('this ran')\n")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    changed(place / "model_index.json", **entry)
    refused(lambda: LatentPrior.from_pretrained(place), word)


# --- numbers in configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", None, 0, -1.0, float("nan"), float("inf"), True, [1.0]])
def test_the_scale_of_latents_is_a_positive_number(value, folder):
    place = folder()
    changed(place / "vae" / "config.json", scaling_factor=value)
    for call in (lambda: LatentPrior.from_pretrained(place), lambda: load_vae(str(place))):
        refused(call, f"has scaling_factor={value!r}; it is a number above 0")


@pytest.mark.parametrize("value", ["x", float("nan"), True, [0.0]])
def test_the_shift_of_latents_is_a_number(value, folder):
    place = folder()
    changed(place / "vae" / "config.json", shift_factor=value)
    refused(lambda: LatentPrior.from_pretrained(place), f"has shift_factor={value!r}; it is a number, or null")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("value", [[1.0, 2.0], "abcd", [1.0, "a", 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0], 3.0])
def test_the_scale_of_a_video_s_latents_is_a_number_for_each_channel(key, value, folder):
    place = folder("wan")
    changed(place / "vae" / "config.json", **{key: value})
    refused(lambda: LatentPrior.from_pretrained(place), f"{key}=", "they are 4 numbers each")


def test_deviations_of_latents_are_above_0(folder):
    place = folder("wan")
    changed(place / "vae" / "config.json", latents_std=[1.0, 0.0, 1.0, 1.0])
    refused(lambda: load_vae(str(place / "vae")), "those of latents_std above 0")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"trained_betas": [0.1] * 10}, "10 trained_betas beside num_train_timesteps=1000"),
        ({"trained_betas": 0.1}, "1 trained_betas beside num_train_timesteps=1000"),
        ({"trained_betas": [0.1] * 999 + [2.0]}, "has no noise table"),
        ({"prediction_type": "abc"}, "prediction_type='abc'"),
        ({"beta_schedule": "abc"}, "abc is not implemented"),
        ({"num_train_timesteps": -3}, ""),
        ({"num_train_timesteps": "x"}, ""),
        ({"beta_start": None}, ""),
        ({"beta_end": float("nan")}, "has no noise table"),
        ({"beta_end": 3.0}, "has no noise table"),
    ],
)
def test_a_noise_table_that_is_none_is_refused(options, word, folder):
    place = folder()
    changed(place / "scheduler" / "scheduler_config.json", **options)
    refused(lambda: LatentPrior.from_pretrained(place), word, str(place))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_train_timesteps": 0}, ""),
        ({"num_train_timesteps": 1.5}, ""),
        ({"num_train_timesteps": "x"}, ""),
        ({"shift": "x"}, ""),
    ],
)
def test_a_flow_that_is_none_is_refused(options, word, folder):
    place = folder("wan")
    changed(place / "scheduler" / "scheduler_config.json", **options)
    refused(lambda: LatentPrior.from_pretrained(place), word)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler"])
def test_noise_of_another_kind_is_refused(name, folder):
    place = folder()
    changed(place / "model_index.json", scheduler=["diffusers", name])
    refused(lambda: LatentPrior.from_pretrained(place), "")


def test_the_last_time_is_the_last_of_the_table():
    """With rescaled betas time 999 is pure noise and no level; a shorter table has fewer times."""
    rescaled = NoiseTable(tiny_latent.TABLE | {"rescale_betas_zero_snr": True})
    assert rescaled.num_times == 999
    assert rescaled.last_time == 998
    short = NoiseTable({"trained_betas": [0.01, 0.02, 0.05, 0.2], "num_train_timesteps": 4})
    assert short.last_time == 3
    a, b = short.roots(torch.tensor([3]))
    torch.testing.assert_close(a**2, torch.tensor([0.99 * 0.98 * 0.95 * 0.8], dtype=torch.float64))
    torch.testing.assert_close(a**2 + b**2, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("value", ["x", float("nan"), 0, None])
def test_the_scalings_of_a_consistency_model_are_numbers(value, tmp_path):
    tiny_latent.pipeline("lcm").save_pretrained(tmp_path)
    changed(tmp_path / "scheduler" / "scheduler_config.json", timestep_scaling=value)
    refused(lambda: LatentPrior.from_pretrained(tmp_path), f"timestep_scaling={value!r}")


# --- parts that do not fit together ------------------------------------------------------------------------------


def test_parts_of_different_models_are_refused(folder, tmp_path):
    place = folder()
    vae = tiny_latent.vae()
    other = type(vae).from_config(dict(vae.config) | {"latent_channels": 8})
    other.save_pretrained(tmp_path / "other")
    refused(
        lambda: LatentPrior.from_pretrained(place, vae=str(tmp_path / "other")),
        "takes 4 channels, and its autoencoder's latents have 8",
    )
    refused(lambda: LatentPrior.from_pretrained(place, vae=str(place / "unet")), "an autoencoder of diffusers is need")
    refused(lambda: load_vae(str(tmp_path)), "no autoencoder at")
    tokenizer = tiny_latent.tokenizer_of([("a", "b"), ("c", "d")], tiny_latent.LENGTH)
    tokenizer.save_pretrained(place / "tokenizer")
    refused(lambda: LatentPrior.from_pretrained(place), "has 516 tokens, and its text model knows 514")


# --- files beside the pipeline -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other.safetensors", "other.bin"])
def test_other_weights_of_the_network_are_looked_at(name, folder, tmp_path):
    place, file = folder(), tmp_path / name

    def write(state):
        save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)

    state = tiny_latent.pipeline("sd", seed=1).unet.state_dict()
    write(state)
    loaded = LatentPrior.from_pretrained(place, unet_weights=str(file)).network.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    for damage, word in ((not_a_number, "NaN"), (whole_numbers, "floats"), (missing, "holds no weights of the pipel")):
        damaged = {key: value.clone() for key, value in state.items()}
        damage(damaged)
        write(damaged)
        refused(lambda: LatentPrior.from_pretrained(place, unet_weights=str(file)), word, str(file))
    file.write_bytes(file.read_bytes()[:500])
    refused(lambda: LatentPrior.from_pretrained(place, unet_weights=str(file)), f"{file} is damaged")
    refused(
        lambda: LatentPrior.from_pretrained(place, unet_weights="nothing.bin"), "neither a file nor OWNER/NAME/FILE"
    )
    if name.endswith("bin"):
        torch.save([1, 2], file)
        refused(lambda: LatentPrior.from_pretrained(place, unet_weights=str(file)), "holds no tensors by name")


def lora_of(place, **options):
    """Write a LoRA of the tiny network, with B that is not 0."""
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    for parameter in prior.add_lora(LoraSpec(rank=2, output_conv=False, **options)):
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    prior.save_lora(place)
    return place / "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_a_lora_is_whole_and_fits_or_is_refused(folder, tmp_path):
    place, lora = folder(), tmp_path / "lora"
    file = lora_of(lora)
    prior = LatentPrior.from_pretrained(place, lora=str(lora))
    z, words = torch.randn(1, 4, 8, 8), prior.encode_prompt("a")
    with torch.no_grad():
        adapted = prior.estimate(z, 500, words)
        assert (adapted - LatentPrior.from_pretrained(place).estimate(z, 500, words)).abs().max() > 0.01
    state = load_file(file)
    foreign = {name.replace("unet.", "unet.other."): value for name, value in state.items()}
    some = state | {"unet.mid_block.other.lora_A.weight": torch.zeros(2, 8)}
    some |= {"unet.mid_block.other.lora_B.weight": torch.zeros(8, 2)}
    nan = {name: value.clone() for name, value in state.items()}
    not_a_number(nan)
    for tensors, word in (
        (foreign, ""),
        (some, "tensors fit here"),
        ({f"other.{name}": value for name, value in state.items()}, "0 of its"),
        (nan, "holds NaN"),
        ({name: value.int() for name, value in state.items()}, "weights are floats"),
        ({name: torch.zeros(3, 3) for name in state}, ""),
    ):
        save_file(tensors, file)
        refused(lambda: LatentPrior.from_pretrained(place, lora=str(lora)), word, str(lora))
    file.write_bytes(file.read_bytes()[:-10])
    refused(lambda: LatentPrior.from_pretrained(place, lora=str(lora)), f"{lora} cannot be loaded by diffusers")
    refused(lambda: LatentPrior.from_pretrained(place, lora=str(tmp_path / "none")), f"nothing at '{tmp_path}/none'")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_saved_prompt_is_a_prompt_of_this_model(kind, tmp_path):
    prior, file = LatentPrior(tiny_latent.pipeline(kind)), tmp_path / "prompt.safetensors"
    prior.save_prompt(prior.encode_prompt(["a", "b"]), file)
    assert len(prior.load_prompt(file)) == 2
    state, about = load_file(file), {MADE_BY: prior.fingerprint}
    embeds = state["embeds"]
    for change, word in (
        ({"embeds": embeds.int()}, "weights are floats"),
        ({"embeds": embeds * float("nan")}, "holds NaN"),
        ({"embeds": embeds[0]}, "holds tensors {'embeds'"),
        ({"embeds": embeds[:0]}, "holds tensors {'embeds'"),
        ({"embeds": embeds[..., :-1].clone()}, "prompts of this model are {'embeds'"),
        ({"embeds": embeds[:, :-1].clone()}, "prompts of this model are {'embeds'"),
        ({"embeds": torch.tensor(1.0)}, "holds tensors"),
        ({"pooled": torch.zeros(1, tiny_latent.WIDTH)}, "holds tensors"),
        ({"other": torch.zeros(2)}, "'other': [2]"),
    ):
        save_file(state | change, file, about)
        refused(lambda: prior.load_prompt(file), word, str(file))
    save_file({"other": torch.zeros(2)}, file, about)
    refused(lambda: prior.load_prompt(file), str(file))
