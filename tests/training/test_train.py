# SPDX-License-Identifier: Apache-2.0
"""Whole runs, in this process: every task, and what they leave behind."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.lora_files import load_lora
from k3jax.checkpoints.restore import iterate_leaves
from k3jax.config import LoraConfig
from k3jax.images.pngs import write_png
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.scenes.caption import captioned
from k3jax.sharding import make_mesh
from k3jax.training.metrics import read_metrics
from k3jax.training.tasks import make_task
from k3jax.training.train_config import CheckpointConfig, MaskConfig, PriorConfig
from k3jax.training.training_run import TrainingRun, train

from random_checkpoint import write_random_checkpoint
from training_models import WIDE


def losses(run, name="loss"):
    folder = run.train.output
    return [record[name] for record in read_metrics(f"{folder}/metrics.jsonl") if name in record]


def weights(path, component):
    return dict(iterate_leaves(path, component))


@pytest.mark.slow
def test_the_loss_falls_on_a_few_scenes_and_resumes(run, tmp_path):
    base = tmp_path / "base"
    write_random_checkpoint(base, WIDE)
    wanted = run(
        steps=200,
        checkpoint=CheckpointConfig(every=1000),
        ema_decay=0.9,
        validation_batches=1,
        data={"num_scenes": 16, "cache": str(tmp_path / "cache")},
        optimizer={"learning_rate": 3e-3, "schedule": "cosine"},
        loss={"snr_gamma": 5.0},
        from_scratch=True,
    )
    wanted = dataclasses.replace(wanted, checkpoint=str(base))
    result = train(wanted)
    values = losses(wanted, "noise_mse")
    assert len(values) == 200
    assert np.mean(values[:3]) > 0.9  # of noise with variance 1
    assert np.mean(values[-8:]) < 0.35
    assert losses(wanted, "validation_loss")[-1] < 1

    checkpoint = read_checkpoint(result)
    assert checkpoint.source["task"] == "text_to_image" and checkpoint.dtype == "float32"
    assert checkpoint.component_paths["movq"] == read_checkpoint(base).component_paths["movq"]
    assert train(wanted) == result  # nothing is left to do, and nothing is lost
    pipe = Kandinsky3Pipeline.from_pretrained(result, dtype="float32", batch_size=8)
    image = pipe("a red circle", num_inference_steps=2, progress_bar=False).images[0]
    assert image.size == (64, 64)


def test_another_run_is_not_continued(run, stub_loss):
    train(run(steps=1, cached=False))
    with pytest.raises(ValueError, match=r"batch_size is 16 and was 8"):
        train(run(steps=1, cached=False, batch_size=16))


@pytest.mark.slow
def test_lora_trains_nothing_else(run, base):
    wanted = run(lora=LoraConfig(rank=2), steps=3, optimizer={"learning_rate": 1e-2})
    result = train(wanted)
    lora = load_lora(result)
    assert lora.base_fingerprint == read_checkpoint(base).fingerprint
    assert any(np.abs(pair["b"]).max() > 0 for pair in lora.weights.values())
    pipe = Kandinsky3Pipeline.from_pretrained(base, dtype="float32", batch_size=8)
    call = dict(prompt="a red circle", num_inference_steps=2, output_type="np", progress_bar=False)
    before = pipe(**call).images
    pipe.load_lora(result)
    assert np.abs(pipe(**call).images - before).max() > 1e-4
    pipe.load_lora(result, scale=0.0)
    np.testing.assert_array_equal(pipe(**call).images, before)


@pytest.mark.slow
def test_inpainting_from_text_to_image(run, base, stub_loss):
    wanted = run(task="inpainting", components=("unet",), steps=2, cached=False)
    checkpoint = read_checkpoint(train(wanted))
    assert checkpoint.config.unet.in_channels == 9
    kernel = weights(checkpoint, "unet")["conv_in.kernel"]
    assert kernel.shape[2] == 9 and np.abs(kernel[:, :, 4:]).max() > 0
    shared = read_checkpoint(base).component_paths
    assert checkpoint.component_paths["text_projection"] == shared["text_projection"]


@pytest.mark.slow
def test_cached_and_uncached_batches_train_alike(run, tmp_path):
    results = [
        train(run(cached=cached, steps=2, output=str(tmp_path / str(cached))))
        for cached in (True, False)
    ]
    cached, uncached = (weights(path, "unet") for path in results)
    for name in cached:  # the cache holds float16
        np.testing.assert_allclose(cached[name], uncached[name], atol=3e-3, err_msg=name)


@pytest.mark.slow
def test_text_encoder_and_movq_from_scratch(run, tmp_path, base):
    model = read_checkpoint(base).config
    model = dataclasses.replace(
        model, text_encoder=dataclasses.replace(model.text_encoder, vocab_size=416)
    )
    first = run(task="text_encoder", from_scratch=True, steps=2, output=str(tmp_path / "text"))
    first = dataclasses.replace(first, checkpoint=None, model=model)
    text = read_checkpoint(train(first))
    assert set(text.component_paths) == {"text_encoder"}

    second = run(
        task="movq",
        from_scratch=True,
        steps=3,
        sample_every=3,
        cached=False,
        data={"crop": 64, "resolution": 128},
        optimizer={"learning_rate": 2e-3},
        output=str(tmp_path / "movq"),
    )
    second = dataclasses.replace(second, checkpoint=str(text.path))
    both = read_checkpoint(train(second))
    assert set(both.component_paths) == {"text_encoder", "movq"}
    assert losses(second, "mse")[-1] < losses(second, "mse")[0]
    size = Image.open(tmp_path / "movq" / "samples" / "step_00000003.png").size
    assert size == (8 * 64, 2 * 64)  # 8 pairs of scene and reconstruction

    third = run(
        task="movq",
        decoder_only=True,
        steps=3,
        cached=False,
        ema_decay=0.9,
        optimizer={"name": "muon", "learning_rate": 2e-3},
        output=str(tmp_path / "decoder"),
    )
    third = dataclasses.replace(third, checkpoint=str(both.path))
    old, new = weights(both.path, "movq"), weights(train(third), "movq")
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_prior_preservation_weighs_each_part_by_its_mean(run, tmp_path):
    (tmp_path / "class").mkdir()
    for number in range(4):
        image, caption, _ = captioned(5, number, size=64)
        write_png(Image.fromarray(image), tmp_path / "class" / f"{number}.png")
        (tmp_path / "class" / f"{number}.txt").write_text(caption)
    wanted = run(cached=False, prior=PriorConfig(str(tmp_path / "class"), weight=0.5, share=0.25))
    checkpoint = read_checkpoint(wanted.checkpoint)
    task = make_task(wanted.train, None, checkpoint, make_mesh("data=1", jax.devices()[:1]))
    batch = next(task.open_data(checkpoint.path / "tokenizer", False).batches)
    np.testing.assert_allclose(batch["weight"], [8 / 6] * 6 + [0.5 * 8 / 2] * 2)
    assert batch["images"].shape == (8, 64, 64, 3)
    # mean(weight x error) = mean of the subject's errors + 0.5 mean of the class's
    error = np.arange(8.0)
    np.testing.assert_allclose(
        (batch["weight"] * error).mean(), error[:6].mean() + 0.5 * error[6:].mean()
    )


@pytest.mark.slow
def test_metrics_and_pictures_are_written(run, tmp_path):
    wanted = run(steps=2, sample_every=2, sample_prompts=("a red circle", "a blue square"))
    train(wanted)
    folder = tmp_path / "run"
    record = list(read_metrics(folder / "metrics.jsonl"))[-1]
    assert {"loss", "grad_norm", "learning_rate", "step_time", "images_per_s"} <= set(record)
    assert (folder / "samples" / "step_00000002.png").exists()
    assert (folder / "loss.png").exists() and list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "run.json").read_text())["train"]["steps"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": ("movq",)}, "trains the unet"),
        (
            {"batch_size": 7, "optimizer": {"gradient_accumulation_steps": 2}},
            "choose a multiple of 2",
        ),
        ({"lora": LoraConfig(targets=("to_x",))}, "to_x"),
        ({"components": ("text_encoder", "unet")}, "leave out one of the two"),
        ({"validation_batches": 2}, "ask for fewer"),
        ({"data": {"kind": "folder", "path": "nowhere"}}, "nowhere"),
        ({"optimizer": {"schedule": "cosine", "warmup_steps": 9}}, "warm-up"),
        ({"loss": {"timesteps": (600, 1001)}}, "one after the last"),
        (
            {
                "task": "inpainting",
                "masks": MaskConfig(objects=1),
                "data": {"kind": "folder", "path": "nowhere"},
            },
            "train.masks.objects is 1",
        ),
        ({"decoder_only": True}, "needs train.task movq"),
        ({"task": "superresolution"}, "train.task is 'superresolution'; .* text_to_image, inpai"),
        ({"task": "movq", "lora": LoraConfig()}, "train.task is 'movq'; .* with train.lora"),
        ({"data": {"cache": "gs://bucket/cache"}}, "train.data.cache is gs://bucket/cache"),
    ],
)
def test_refusals_come_before_training(run, change, message):
    with pytest.raises(ValueError, match=message):
        train(run(**change))


def test_a_base_is_needed(run):
    with pytest.raises(ValueError, match="needs a checkpoint"):
        train(TrainingRun(run().train))


@pytest.mark.slow
def test_pictures_of_inpainting(run, tmp_path):
    prompts = ("a red circle", "a blue square")
    shown = {"steps": 1, "sample_every": 1, "sample_prompts": prompts, "cached": False}
    train(run(task="inpainting", components=("unet",), **shown))
    size = Image.open(tmp_path / "run" / "samples" / "step_00000001.png").size
    assert size == (3 * 64, 2 * 64)  # given, made, there: a row for each prompt
