# SPDX-License-Identifier: Apache-2.0
"""Previews while images are made."""

import numpy as np
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import restore
from k3jax.pipelines import preview
from k3jax.pipelines.preview import fit_preview, flat_images, latents_to_rgb
from k3jax.sampling.denoise import denoise_program
from k3jax.scenes.caption import captioned

from pictures import picture


CALL = dict(height=64, width=64, sampler="ddpm", output_type="np", progress_bar=False)


def test_a_map_that_is_linear_is_found():
    """A MoVQ whose decoder is a linear map of the latents."""
    import jax
    import jax.numpy as jnp

    mixing = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32) * 0.2

    @jax.tree_util.register_static
    class Linear:
        def encode(self, images):
            b, h, w, _ = images.shape
            means = images.reshape(b, h // 8, 8, w // 8, 8, 3).mean((2, 4))
            return jnp.concatenate([means, means[..., :1] * means[..., 1:2]], axis=-1)

        def decode(self, latents):
            colors = latents @ mixing + 0.1
            return jnp.repeat(jnp.repeat(colors, 8, axis=1), 8, axis=2)

    found = fit_preview(Linear())
    assert found.shape == (5, 3)
    assert np.allclose(found[:4], mixing / 2, atol=1e-4)
    assert np.allclose(found[4], 0.55, atol=1e-4)
    latents = np.zeros((2, 3, 5, 4), np.float32)
    assert (latents_to_rgb(latents, found) == round(0.55 * 255)).all()


def test_it_is_fitted_to_all_colours():
    images = flat_images(16, 64)
    assert images.dtype == np.uint8 and images.shape == (16, 64, 64, 3)
    colors = images.reshape(-1, 3)
    assert (colors.min(0) == 0).all() and (colors.max(0) == 255).all()
    assert len(np.unique(colors, axis=0)) > 50


@pytest.mark.slow
def test_the_trained_model_looks_like_its_previews():
    """Of scenes, each preview's pixels against the mean colours of what the decoder makes."""
    movq = restore(read_checkpoint("tiny"), "movq", dtype="float32")
    images = np.stack([captioned(22, index, "test")[0] for index in range(8)])
    latents, colors = (np.asarray(x) for x in preview._pairs(movq, images))
    shown = latents_to_rgb(latents, fit_preview(movq)) / 255
    assert 1 - np.square(shown - colors).mean() / colors.var((0, 1, 2)).mean() > 0.9


def test_the_callback_sees_what_the_image_will_be(base):
    """Every 2 of 6 steps, for each batch; the last preview is of the image itself."""
    seen = []
    images = base(
        ["a cat", "a dog"], num_inference_steps=6, callback=seen.append, callback_steps=2, **CALL
    ).images
    assert [(p.step, p.num_steps, p.index.tolist()) for p in seen] == [
        (2, 6, [0]),
        (4, 6, [0]),
        (6, 6, [0]),
        (2, 6, [1]),
        (4, 6, [1]),
        (6, 6, [1]),
    ]
    assert seen[0].timestep == 665 and seen[2].timestep == 1
    latents = base(["a cat"], num_inference_steps=6, **(CALL | dict(output_type="latent"))).images
    # A program of its own, so rounded in its own way.
    assert np.abs(seen[2].latents.clip(-1, 1) - latents).max() < 1e-4
    (small,) = seen[2].images()
    (large,) = seen[2].images(enlarge=8)
    assert small.size == (8, 8) and large.size == (64, 64)
    plain = base(["a cat", "a dog"], num_inference_steps=6, **CALL).images
    assert np.abs(plain - images).max() <= 1 / 255


def test_unused_it_is_the_program_that_it_was(base):
    """No other program, and a used one only once."""
    base("a cat", num_inference_steps=6, **CALL)
    compiled = denoise_program._cache_size()
    base("a cat", num_inference_steps=6, **CALL)
    assert denoise_program._cache_size() == compiled
    for steps in (1, 2, 3):
        base("a", num_inference_steps=6, callback=len_of, callback_steps=steps, **CALL)
    assert denoise_program._cache_size() <= compiled + 1


def len_of(step_preview):
    return len(step_preview.images())


def test_a_map_is_fitted_once_for_each_movq(img2img, tmp_path, monkeypatch):
    """And kept in the cache, under the digest of the weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fitted = []
    fit = preview.fit_preview
    monkeypatch.setattr(preview, "fit_preview", lambda movq: fitted.append(1) or fit(movq))
    arguments = img2img.movq, "sha256:123abc"
    for expected in (1, 1, 1):
        found = preview.preview_map(*arguments)
        assert len(fitted) == expected and found.shape == (5, 3)
    (file,) = (tmp_path / "k3jax" / "previews").iterdir()
    assert file.name == "123abc.json"
    file.write_text("[1, 2")
    assert np.array_equal(preview.preview_map(*arguments), found) and len(fitted) == 2
    assert img2img.preview_map() is img2img.preview_map()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_in_image_to_image(img2img, strength):
    seen = []
    img2img(
        "a cat",
        picture(0),
        strength=strength,
        num_inference_steps=6,
        sampler="ddpm",
        callback=seen.append,
        progress_bar=False,
    )
    assert [p.step for p in seen] == list(range(1, int(6 * strength) + 1))
