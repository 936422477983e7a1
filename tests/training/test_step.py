# SPDX-License-Identifier: Apache-2.0
"""The loss, the optimiser and the compiled step, also on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.config import COMPONENTS, SamplerConfig
from k3jax.model.abstract import abstract_module
from k3jax.model.context import Context, PromptEmbeds
from k3jax.pipelines.programs import computing
from k3jax.sampling import schedule
from k3jax.sharding import make_mesh
from k3jax.training.denoising_loss import (
    check_loss,
    denoising_loss,
    layout_weight,
    min_snr_weight,
    training_context,
)
from k3jax.training.loop import put_batch
from k3jax.training.optimizer import decayed, learning_rate, make_optimizer, matrices
from k3jax.training.state import TrainState, new_state, state_shardings, weights_of
from k3jax.training.step import make_step
from k3jax.training.tasks import make_task
from k3jax.training.tasks.caption_reading import ReadingHeads
from k3jax.training.train_config import DataConfig, LossConfig, OptimizerConfig, TrainConfig

import random_checkpoint
from training_models import WIDTH


ROUNDING = 1e-3  # of a weight's largest update (1e-2 a step): float32, summed in another order


COSINE = SamplerConfig()  # the original's


class Echo:
    """A U-Net that says the noise is nothing, or all it sees."""

    def __init__(self, factor):
        self.factor, self.seen = factor, []

    def __call__(self, sample, timesteps, context):
        self.seen.append((sample, timesteps))
        return self.factor * sample[..., :4]


def test_the_loss_is_that_of_the_noise():
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8, 8, 4)), jnp.float32)
    nothing = Echo(0.0)
    loss, metrics = denoising_loss(nothing, None, latents, jax.random.key(1), LossConfig(), COSINE)
    assert loss == metrics["noise_mse"] and abs(float(loss) - 1) < 0.02  # variance of the noise
    noisy, timesteps = nothing.seen[0]
    assert timesteps.min() >= 0 and timesteps.max() < 1000 and len(set(timesteps.tolist())) > 50
    # x = sqrt(a) latents + sqrt(1 - a) noise, so what is left of it has the noise's variance.
    a = schedule.alphas_cumprod(schedule.cosine_betas(1000))[np.asarray(timesteps)]
    a = a[:, None, None, None]
    noise = (noisy - np.sqrt(a) * latents) / np.sqrt(1 - a)
    high = np.asarray(timesteps) > 100  # below, the division magnifies rounding
    np.testing.assert_allclose(np.asarray(noise)[high].var(), 1, atol=0.03)

    weight = jnp.zeros(64).at[3].set(64.0)
    one, _ = denoising_loss(
        Echo(0.0), None, latents, jax.random.key(1), LossConfig(), COSINE, weight=weight
    )
    np.testing.assert_allclose(one, np.square(noise[3]).mean(), rtol=1e-3)


def test_min_snr_weights():
    a = jnp.asarray([0.999, 0.5, 0.01])
    np.testing.assert_allclose(min_snr_weight(a, 5.0), [5 / 999, 1, 1], rtol=1e-4)
    latents = jnp.zeros((256, 8, 8, 4))
    plain, metrics = denoising_loss(
        Echo(0.0), None, latents, jax.random.key(0), LossConfig(snr_gamma=5.0), COSINE
    )
    assert plain < metrics["noise_mse"]


SCHEDULES = {
    "squaredcos_cap_v2": lambda: schedule.cosine_betas(1000),
    "linear": lambda: np.linspace(1e-4, 0.02, 1000, dtype=np.float32),
    "scaled_linear": lambda: np.linspace(0.01, 0.02**0.5, 1000, dtype=np.float32) ** 2,
}


def knowing(sampler, betas, error):
    """A U-Net that predicts what diffusers' schedulers want of it, for clean latents of 0.5."""
    a_bar = np.cumprod(1 - betas.astype(np.float64))

    def unet(sample, timesteps, context):
        a = jnp.asarray(a_bar, jnp.float32)[timesteps][:, None, None, None]
        noise = (sample - jnp.sqrt(a) * 0.5) / jnp.sqrt(1 - a)
        exact = {
            "epsilon": noise,
            "sample": jnp.full_like(noise, 0.5),
            "v_prediction": jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * 0.5,
        }[sampler.prediction_type]
        return exact + error

    return unet, a_bar


@pytest.mark.parametrize("betas", SCHEDULES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_loss_follows_the_checkpoints_schedule_and_prediction(kind, betas):
    sampler = SamplerConfig(
        name="ddim", prediction_type=kind, beta_schedule=betas, beta_start=1e-4, beta_end=0.02
    )
    latents = jnp.full((64, 4, 4, 4), 0.5)
    # From step 100 on: below, the noise cannot be told from rounding.
    span = {"timesteps": (100, 101)}

    def loss(error, **config):
        unet, a_bar = knowing(sampler, SCHEDULES[betas](), error)
        config = LossConfig(**span, **config)
        value, metrics = denoising_loss(unet, None, latents, jax.random.key(0), config, sampler)
        return float(value), float(metrics["noise_mse"]), a_bar[100]

    assert loss(0.0)[0] < 1e-6
    plain, noise_mse, a = loss(0.1)
    np.testing.assert_allclose(plain, 0.01, rtol=2e-3)
    snr = a / (1 - a)
    # What the error of the prediction is as one of the noise, and the published min-SNR weights.
    of_noise = {"epsilon": 1, "sample": snr, "v_prediction": a}[kind]
    weight = {"epsilon": min(snr, 5) / snr, "sample": min(snr, 5)}
    weight["v_prediction"] = min(snr, 5) / (snr + 1)
    np.testing.assert_allclose(noise_mse, 0.01 * of_noise, rtol=2e-3)
    np.testing.assert_allclose(loss(0.1, snr_gamma=5.0)[0], 0.01 * weight[kind], rtol=2e-3)


def test_timesteps_and_samplers_that_contradict_each_other_are_refused():
    short = SamplerConfig(name="ddpm", num_train_timesteps=500)
    check_loss(LossConfig(timesteps=(0, 500)), short)
    check_loss(LossConfig(), SamplerConfig(name="ddim", prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=r"timesteps is \(0, 1000\): .* within 0 and 500"):
        check_loss(LossConfig(), short)
    with pytest.raises(ValueError, match=r"sampler is kandinsky, .* its prediction_type is sample"):
        check_loss(LossConfig(), SamplerConfig(prediction_type="sample"))
    with pytest.raises(ValueError, match=r"sampler is kandinsky, .* its beta_schedule is linear"):
        check_loss(LossConfig(), SamplerConfig(beta_schedule="linear"))
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid' is not known"):
        check_loss(LossConfig(), SamplerConfig(name="ddpm", beta_schedule="sigmoid"))


def test_errors_at_high_noise_weigh_as_those_of_the_image():
    a = jnp.asarray([0.999, 0.5, 0.2, 0.001])
    np.testing.assert_allclose(layout_weight(a, 30.0), [1, 1, 4, 30], rtol=1e-4)
    latents = jnp.zeros((256, 8, 8, 4))
    loss, metrics = denoising_loss(
        Echo(0.0), None, latents, jax.random.key(0), LossConfig(layout_weight=30.0), COSINE
    )
    assert loss > 2 * metrics["noise_mse"]


def test_the_timesteps_that_are_trained():
    """By a U-Net that notes which it is given."""
    seen = []

    def unet(sample, timesteps, context):
        seen.append(np.asarray(timesteps))
        return sample

    for span in ((0, 1000), (600, 970)):
        latents = jnp.zeros((4096, 1, 1, 4))
        config = LossConfig(timesteps=span)
        denoising_loss(unet, None, latents, jax.random.key(0), config, COSINE)
        assert seen[-1].min() - span[0] in range(8) and span[1] - seen[-1].max() in range(1, 8)


@pytest.mark.parametrize("conditioning", ["diffusers", "original"])
def test_dropped_captions_get_the_checkpoints_own_unconditional_input(conditioning):
    """By a projection that only says what it was asked for."""

    class Projection:
        def __call__(self, prompt, conditioning):
            return self._context(prompt.lengths, 1.0)

        def unconditional(self, lengths, rows, conditioning):
            return self._context(lengths, -1.0)

        def _context(self, lengths, value):
            states = jnp.full((len(lengths), 6, 2), value)
            return Context(states, jnp.zeros((len(lengths), 6)), lengths)

    lengths = jnp.arange(1000) % 5 + 2
    prompt = PromptEmbeds(jnp.zeros((1000, 6, 2)), jnp.ones((1000, 6), bool), lengths)
    context = training_context(Projection(), prompt, conditioning, jax.random.key(0), 0.25)
    dropped = np.asarray(context.hidden_states[:, 0, 0]) < 0
    assert 0.2 < dropped.mean() < 0.3
    np.testing.assert_array_equal(context.lengths, lengths)  # of its own window all the same
    whole = training_context(Projection(), prompt, conditioning, jax.random.key(0), 0.0)
    assert (whole.hidden_states > 0).all()


def test_learning_rates():
    constant = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 100)
    assert [float(constant(k)) for k in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="cosine", final_learning_rate=0.1
    )
    cosine = learning_rate(config, 100)
    np.testing.assert_allclose([cosine(10), cosine(55), cosine(100)], [1, 0.55, 0.1], rtol=1e-5)


DECAYED = {
    "text_encoder.embed_tokens.embedding": (6, 4),
    "text_encoder.layers.attention.q.kernel": (3, 4, 4),
    "unet.conv_in.kernel": (3, 3, 4, 4),
    "unet.time_embedding.linear_1.kernel": (4, 4),
    "reading_heads.kernels.color": (4, 2),
    "down_blocks.0.attention.to_q.a": (4, 2),
    "down_blocks.0.attention.to_q.b": (2, 4),
}
NOT_DECAYED = {
    "text_encoder.relative_attention_bias.embedding": (6, 4),
    "text_encoder.layers.attention_norm.scale": (3, 4),
    "movq.codebook.embedding": (6, 4),
    "text_encoder.final_norm.scale": (4,),
    "text_projection.null_embedding": (4,),
    "text_projection.norm.bias": (4,),
    "unet.layers.conv.bias": (3, 4),
}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_what_decays(name):
    """Kernels, token embeddings and LoRA factors; nothing else, stacked or not."""
    config = OptimizerConfig(
        name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5, max_grad_norm=None
    )
    rule = make_optimizer(config, 10)
    weights = {name: jnp.ones(shape) for name, shape in {**DECAYED, **NOT_DECAYED}.items()}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, weights), rule.init(weights), weights)
    for name in weights:
        expected = -0.05 if name in DECAYED else 0
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, err_msg=name)


def test_every_weight_of_the_model_decays_or_does_not_as_its_kind_says():
    modules = {name: abstract_module(name, random_checkpoint.MODEL) for name in COMPONENTS}
    weights = weights_of({**modules, "reading_heads": ReadingHeads(8, 0)})
    kept = {name for name, decays in decayed(weights).items() if not decays}
    assert {name for name in kept if not name.endswith((".bias", ".scale"))} == {
        "text_encoder.relative_attention_bias.embedding",
        "text_projection.null_embedding",
    }
    assert not any(name.endswith((".bias", ".scale")) for name in weights.keys() - kept)
    turned = [name for name, how in matrices(weights).items() if how is not None]
    assert {name.split(".")[-1] for name in turned} == {"kernel"}
    assert sum(name.startswith("text_encoder.layers.") for name in turned) == 7


def test_muon_turns_matrices_evenly_and_leaves_both_ends_to_adam():
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0)
    rule = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    shapes = {"q.kernel": (16, 24), "conv.kernel": (3, 3, 4, 16), "conv_in.kernel": (3, 3, 4, 8)}
    weights = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    # Gradients of one strong direction: it must not drown the others.
    grads = {
        name: jnp.asarray(rng.normal(size=shape) * np.geomspace(1, 1e-2, shape[-1]), jnp.float32)
        for name, shape in shapes.items()
    }
    updates, _ = rule.update(grads, rule.init(weights), weights)
    for name in ("q.kernel", "conv.kernel"):
        matrix = np.asarray(updates[name]).reshape(-1, shapes[name][-1])
        strengths = np.linalg.svd(matrix, compute_uv=False)
        assert strengths.max() < 3 * strengths.min()
        # The size of the updates is Adam's in the middle of a run.
        assert 0.1 < np.sqrt((matrix**2).mean()) < 0.3
    sizes = np.abs(updates["conv_in.kernel"])  # Adam's first step has one size for all
    assert sizes.max() < 1.01 * sizes.min()


def test_muon_turns_each_layer_of_a_stack_by_itself():
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, max_grad_norm=None)
    rule = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    for shape in ((8, 12), (3, 3, 4, 8)):
        weights = jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32)
        grads = jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32)

        def update(grads, weights):
            grads, weights = {"a.kernel": grads}, {"a.kernel": weights}
            return rule.update(grads, rule.init(weights), weights)[0]["a.kernel"]

        stacked = update(grads, weights)
        for layer in range(3):
            alone = update(grads[layer], weights[layer])
            np.testing.assert_allclose(stacked[layer], alone, rtol=1e-4, atol=1e-6)


def test_muon_leaves_norms_and_lora_to_adam():
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0)
    rule = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in DECAYED.items() if name[-2:] in (".a", ".b")}
    shapes["layers.attention_norm.scale"] = (3, 4)
    weights = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    grads = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    updates, _ = rule.update(grads, rule.init(weights), weights)
    for name, value in updates.items():  # Adam's first step has one size for all
        np.testing.assert_allclose(np.abs(value), np.abs(value).max(), rtol=1e-3, err_msg=name)


def test_adafactor_remembers_rows_and_columns_only():
    rule = make_optimizer(OptimizerConfig(name="adafactor"), 10)
    state = rule.init({"kernel": jnp.ones((256, 512))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2000


def step_config(ema_decay, parts=1):
    rule = OptimizerConfig(gradient_accumulation_steps=parts)
    return TrainConfig(ema_decay=ema_decay, optimizer=rule)


def quadratic(weights, frozen, batch, key):
    error = batch["x"] @ weights["w"] - batch["y"]
    return jnp.square(error).mean(), {"error": jnp.abs(error).mean()}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((12, 3)), "y": rng.standard_normal((12,))}
    weights = {"w": jnp.asarray(rng.standard_normal(3))}
    rule = optax.sgd(0.1)
    results = []
    for parts in (1, 4):
        step = make_step(quadratic, rule, step_config(0.5, parts))
        state = TrainState(jnp.zeros((), jnp.int32), weights, weights, rule.init(weights))
        for _ in range(3):
            state, metrics = jax.jit(step)(state, None, batch)
        results.append((state, metrics))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_average_of_the_weights():
    rule = optax.sgd(1.0)
    step = make_step(lambda w, f, b, k: (w["w"], {}), rule, step_config(0.15))
    weights = {"w": jnp.asarray(0.0)}
    state = TrainState(jnp.zeros((), jnp.int32), weights, weights, rule.init(weights))
    average = 0.0
    for k in range(5):
        state, _ = step(state, None, None)
        decay = min(0.15, (1 + k) / (10 + k))
        average = average * decay + -(k + 1) * (1 - decay)
    np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)


def two_steps(base, spec, devices, name="adamw"):
    """(first weights, state and loss after two steps) on a mesh of so many devices."""
    mesh = make_mesh(spec, jax.devices()[:devices])
    # A large epsilon: of gradients that are rounding errors Adam would make steps of full length.
    rule = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, eps=1e-3)
    config = TrainConfig(
        dtype="float32",
        batch_size=8,
        remat=False,
        ema_decay=0.9,
        optimizer=rule,
        data=DataConfig(cache="not read here"),
    )
    checkpoint = read_checkpoint(base)
    task = make_task(config, None, checkpoint, mesh)
    optimizer = make_optimizer(rule, 10)
    placed = state_shardings(task.shapes, task.shardings, optimizer, mesh, True)
    weights = task.first_weights()
    first = jax.device_get(weights)
    state = new_state(weights, optimizer, placed)
    step = make_step(task.loss, optimizer, config)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    rng = np.random.default_rng(0)
    batch = {
        "latents": rng.standard_normal((8, 8, 8, 4), np.float32),
        "embeds": rng.standard_normal((8, 32, WIDTH), np.float32),
        "attention_mask": np.arange(32) < rng.integers(3, 20, (8, 1)),
    }
    with computing(mesh, config.dtype):
        for _ in range(2):
            state, metrics = step(state, task.frozen_modules(), put_batch(batch, mesh))
    return first, state, float(metrics["loss"])


@pytest.fixture(scope="module")
def alone(base):
    """What one device makes, by the optimiser's name."""
    return functools.cache(lambda name: two_steps(base, "data=1", 1, name))


@pytest.mark.parametrize(
    "spec, name",
    [
        pytest.param("fsdp=2,tensor=2", "adamw", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2,tensor=2", "adamw", marks=pytest.mark.slow),
        pytest.param("data=8", "adamw", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", "adamw", marks=pytest.mark.slow),
        pytest.param("fsdp=8", "adamw", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2,tensor=2", "muon", marks=pytest.mark.slow),
    ],
)
def test_sharded_is_unsharded(base, alone, spec, name):
    first, reference, loss = alone(name)
    _, state, sharded_loss = two_steps(base, spec, 4 if spec == "fsdp=2,tensor=2" else 8, name)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    for weight, value in state.weights.items():
        expected = np.asarray(reference.weights[weight])
        moved = np.abs(expected - first[weight]).max()
        assert np.abs(np.asarray(value) - expected).max() < ROUNDING * max(moved, 1e-2), weight
    kernel = "unet.down_blocks.0.cross_attentions.0.attention.to_q.kernel"
    for leaf in (state.weights[kernel], state.ema[kernel]):
        assert leaf.sharding.is_fully_replicated == (spec == "data=8")
    if name == "adamw":
        moments = optax.tree.get(state.opt_state, "mu")
        assert moments[kernel].sharding.is_fully_replicated == (spec == "data=8")
