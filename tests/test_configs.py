# SPDX-License-Identifier: Apache-2.0
"""Config files, overrides of them, and which of several values wins."""

import dataclasses
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from k3jax.cli import config_files
from k3jax.cli.config_files import config_names
from k3jax.cli.run_config import architecture_differences, build, collect
from k3jax.config import ModelConfig, to_dict
from k3jax.convert.architecture import original_sampler
from k3jax.convert.diffusers_json import sampler_config
from k3jax.sharding import data_parallelism, make_meshes
from k3jax.synthesis.weights import WEIGHTS_SHARE


CONFIGS = Path(__file__).parents[1] / "configs"

# Chips that one process has, and the memory of each in GB, from the makers' data sheets.
MACHINES = {
    "v5e_1": (1, 16),
    "v5e_8": (8, 16),
    "v5e_256": (4, 16),
    "v6e_8": (8, 32),
    "h100_8": (8, 80),
}
# GB in bfloat16: 8.72 billion parameters; U-Net, text projection and MoVQ together 3.33.
ENCODER, OTHERS = 17.4, 6.7


# As published in the repositories of the diffusers layout.
SCHEDULER_CONFIG = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.00085,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
}


def model(name: str) -> ModelConfig:
    return build(collect(name)).model


def test_every_config_is_one():
    released = {"kandinsky30", "kandinsky3", "kandinsky3_diffusers", "flash", "inpainting", "tiny"}
    assert {*released, *MACHINES} <= set(config_names())
    for name in config_names():
        values = config_files.load_config(name)
        run = build(collect(name))
        assert isinstance(run.model, ModelConfig | None)
        # What model it is, what a checkpoint's model is trained for, or what it runs on.
        assert values.get("model") or "train" in values or name in MACHINES
        docstring = next(CONFIGS.glob(f"*/{name}.py")).read_text().split('"""')[1]
        assert f"--config {name}" in docstring, "no command that uses it"


def test_released_models():
    assert model("kandinsky3") == ModelConfig()
    assert model("kandinsky30").sampler == original_sampler("original30", "base")
    assert dataclasses.replace(model("kandinsky30"), sampler=ModelConfig().sampler) == ModelConfig()
    assert model("flash").sampler == original_sampler("original", "flash")
    assert model("inpainting").sampler == original_sampler("original", "inpainting")
    assert model("inpainting").unet == dataclasses.replace(ModelConfig().unet, in_channels=9)
    diffusers = model("kandinsky3_diffusers")
    assert diffusers.conditioning == "diffusers"
    assert diffusers.sampler == sampler_config(SCHEDULER_CONFIG, "here")


@pytest.mark.parametrize("name", MACHINES)
def test_machines(name):
    """A machine goes with every checkpoint: it says nothing of the model."""
    chips, memory = MACHINES[name]
    assert config_files.load_config(name).keys() <= {"pipeline", "synthesize"}
    run = build(collect(name))
    devices = jax.devices()[:chips]
    mesh, encoder_mesh = make_meshes(run.pipeline.mesh, run.pipeline.encoder_mesh, devices)
    for used in (mesh, encoder_mesh):
        assert run.pipeline.batch_size % data_parallelism(used) == 0
    assert run.pipeline.dtype == run.pipeline.param_dtype == "bfloat16"
    weights = sum(
        size / (used.shape["fsdp"] * used.shape["tensor"])
        for size, used in ((ENCODER, encoder_mesh), (OTHERS, mesh))
    )
    if run.synthesize.phases == "alternate":
        encoder = ENCODER / 2 if run.pipeline.int8_text_encoder else ENCODER
        assert max(encoder, OTHERS) < WEIGHTS_SHARE * memory < weights
    else:
        assert weights < WEIGHTS_SHARE * memory


def test_a_config_file_in_full_says_everything_about_the_architecture():
    said = config_files.load_config("kandinsky3")["model"]
    for part, values in to_dict(ModelConfig()).items():
        if isinstance(values, dict) and part != "sampler":
            assert said[part].keys() == values.keys()
        assert part in said


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("generate.seed", "7", 7),
        ("generate.guidance_scale", "3", 3.0),
        ("generate.guidance_scale", "1e-1", 0.1),
        ("generate.height", "none", None),
        ("generate.negative_prompt", "none of it", "none of it"),
        ("generate.guidance_interval", "2,5", (2, 5)),
        ("generate.guidance_interval", "[2, 5]", (2, 5)),
        ("generate.sampler", "dpm++2m", "dpm++2m"),
        ("pipeline.mesh", "data=2,tensor=4", "data=2,tensor=4"),
        ("model.sampler.clip_sample", "false", False),
        ("model.unet.block_out_channels", "384,768,64,128", (384, 768, 64, 128)),
        ("model.unet.block_out_channels", "(384, 768, 64, 128)", (384, 768, 64, 128)),
        ("model.unet.add_self_attention", "true,false,true,true", (True, False, True, True)),
        ("checkpoint", "gs://bucket/a", "gs://bucket/a"),
    ],
)
def test_overrides(key, text, value):
    found = build(collect("kandinsky3", [(key, text)]))
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("generate.sed", "1", r"--config.generate.sed is not .*mean --config.generate.seed\?"),
        ("num_inference_steps", "1", r"mean --config.generate.num_inference_steps\?"),
        ("modell.unet.groups", "1", r"mean --config.model.unet.groups\?"),
        ("generate.seed.x", "1", "--config.generate.seed.x is not a setting"),
        ("xyzzy", "1", r"--config.xyzzy is not a setting\."),
        ("generate.seed", "many", "--config.generate.seed must be a whole number, not 'many'"),
        ("generate.eta", "x", "--config.generate.eta must be a number"),
        ("generate.seed", "none", "must be a whole number"),
        ("model.unet.groups", "1.5", "must be a whole number"),
        ("model.unet", "{}", "--config.model.unet is a group of settings"),
        ("model.sampler.clip_sample", "1", "must be true or false"),
        ("generate.sampler", "euler", "generate.sampler is 'euler'; it must be one of"),
        ("generate.guidance_interval", "1", "guidance_interval must have 2 values"),
        ("model.unet.layers_per_block", "1", "layers_per_block is 1; the up path needs"),
    ],
)
def test_overrides_that_are_wrong(key, text, message):
    with pytest.raises(ValueError, match=message) as error:
        build(collect("kandinsky3", [(key, text)]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("x = 1", r"own.py: get_config\(\) cannot be run \(AttributeError"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("def get_config(): return {'generate': {'sede': 1}}", r"generate has no key 'sede'"),
        ("def get_config(): return {'generate': {'seed': 'x'}}", "generate.seed must be int"),
        ("def get_config(): return {'model': {'unet': {'grups': 1}}}", "unet has no key 'grups'"),
    ],
)
def test_config_files_that_are_wrong(content, message, tmp_path):
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(ValueError, match=message):
        build(collect(str(tmp_path / "own.py")))


def test_config_names_that_are_wrong():
    with pytest.raises(ValueError, match=r"no config 'kandinski3' \(did you mean 'kandinsky3'"):
        collect("kandinski3")
    with pytest.raises(ValueError, match=r"config file own\.py does not exist"):
        collect("own.py")


def test_what_comes_later_wins(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    generate = dict(seed=1, height=64, width=64, eta=0.0)\n"
        "    return ConfigDict(dict(generate=generate))\n"
    )
    overrides = [("generate.height", "128"), ("generate.width", "128")]
    config = build(collect(str(file), overrides, {"generate.width": 256, "generate.eta": None}))
    generate = config.generate
    assert (generate.seed, generate.height, generate.width, generate.eta) == (1, 128, 256, 0.0)
    assert config.model is None and config.checkpoint is None


def test_the_model_of_a_checkpoint_counts_where_the_config_is_silent():
    own = model("tiny")
    assert build(collect(), own).model == own
    changed = build(collect(None, [("model.sampler.eta", "0.5")]), own).model
    assert changed == dataclasses.replace(own, sampler=dataclasses.replace(own.sampler, eta=0.5))
    assert build(collect("kandinsky3"), own).model == ModelConfig()


def test_architecture_differences():
    own = model("tiny")
    assert architecture_differences(own, own) is None
    sampler = dataclasses.replace(
        own, sampler=original_sampler("original", "flash"), sample_size=64
    )
    assert architecture_differences(own, sampler) is None
    unet = dataclasses.replace(own, unet=dataclasses.replace(own.unet, in_channels=9))
    assert architecture_differences(own, unet) == "unet.in_channels is 4 (config: 9)"
    assert architecture_differences(own, ModelConfig()).endswith(", 14 more")


def test_config_dicts_stop_at_the_door():
    values = collect("kandinsky3")

    def check(value):
        assert not isinstance(value, ConfigDict)
        if isinstance(value, dict):
            for inner in value.values():
                check(inner)

    check(values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        build(values).checkpoint = "elsewhere"
