# SPDX-License-Identifier: Apache-2.0
"""Every argument of the three pipelines and of loading: what is converted, and what is refused."""

import inspect
import io
import pathlib
import re
import traceback
import warnings

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.model.tokenizer import PromptTruncatedWarning
from k3jax.pipelines import loading
from k3jax.pipelines.call_inputs import StepCountWarning
from k3jax.pipelines.load_options import LoadOptions, LoraOptions
from k3jax.pipelines.option_fields import config_fields, option_fields
from k3jax.pipelines.options import (
    ImageToImageOptions,
    InpaintOptions,
    TextToImageOptions,
)

import stubs
from pictures import picture


IMAGE, MASK = picture(0), np.ones((64, 64), bool)
OPTIONS = {
    "text_to_image": TextToImageOptions,
    "image_to_image": ImageToImageOptions,
    "inpaint": InpaintOptions,
}
GOOD = {
    "text_to_image": dict(prompt="a", height=64, width=64),
    "image_to_image": dict(prompt="a", image=IMAGE, strength=0.5),
    "inpaint": dict(prompt="a", image=IMAGE, mask_image=MASK),
}
SAMPLING = dict(num_inference_steps=6, sampler="ddpm")
LATENTS = np.zeros((1, 8, 8, 4), np.float32)


@pytest.fixture(scope="module")
def pipes():
    with stubs.without_programs():
        yield stubs.pipelines()


class Tensor:
    """What k3jax knows of a tensor of PyTorch."""

    dtype = "torch.float32"

    def __init__(self, array):
        self.array = np.asarray(array)

    def same(self):
        return self

    detach = cpu = resolve_conj = resolve_neg = float = same

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_arguments_are_in_the_order_of_diffusers():
    orders = {
        "text_to_image": "prompt negative_prompt height width num_inference_steps guidance_scale "
        "num_images_per_prompt seed sampler eta guidance_interval latents step_noise "
        "prompt_embeds negative_prompt_embeds output_type progress_bar callback callback_steps",
        "image_to_image": "prompt image strength num_inference_steps guidance_scale "
        "negative_prompt num_images_per_prompt seed sampler eta guidance_interval max_area "
        "image_latents latents step_noise prompt_embeds negative_prompt_embeds output_type "
        "progress_bar callback callback_steps",
        "inpaint": "prompt image mask_image strength num_inference_steps guidance_scale "
        "negative_prompt num_images_per_prompt seed sampler eta guidance_interval max_area "
        "feather paste_back latents step_noise prompt_embeds negative_prompt_embeds output_type "
        "progress_bar callback callback_steps",
    }
    for name, order in orders.items():
        method = stubs.KINDS[name].__call__
        assert list(inspect.signature(method).parameters) == ["self", *order.split()]
        for argument in order.split():
            assert re.search(rf"^ +{argument}: \S", method.__doc__, re.M), argument


def test_every_option_says_what_it_is():
    """Flags, config keys and docstrings are made from the fields."""
    for cls in (*OPTIONS.values(), LoadOptions, LoraOptions):
        for name, option in option_fields(cls).items():
            assert option.help and not option.help.endswith("."), name
            assert option.checked(option.default) == option.default, name
            if option.flags and option.type is not bool and not option.choices:
                assert option.metavar, name
    defaults = {name: default for name, _, default in config_fields("edit", *OPTIONS.values())}
    assert defaults == {"strength": None, "max_area": None, "feather": None}


def test_an_object_of_options_is_a_call(pipes):
    """Also with what differs from it, and built from groups of a config."""
    seen = []
    pipe, options = pipes["text_to_image"], TextToImageOptions(prompt="a", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stubs.text_to_image,
            "make_images",
            lambda p, g, o: seen.append(o) or stubs.images(p, g, o),
        )
        pipe(options)
        pipe(options, num_images_per_prompt=2.0)
    assert [(o.prompt, o.seed, o.num_images_per_prompt) for o in seen] == [("a", 2, 1), ("a", 2, 2)]
    with pytest.raises(TypeError, match="TextToImageOptions, not InpaintOptions"):
        pipe(InpaintOptions(prompt="a"))

    class Group:
        seed, eta, output = 3, None, "out"

    found = InpaintOptions.from_sources({"seed": 1, "feather": 2}, Group, prompt="a")
    assert (found.seed, found.feather, found.eta, found.prompt) == (3, 2.0, None, "a")


@pytest.mark.parametrize(
    "argument, value, plain",
    [
        ("num_inference_steps", 25.0, 25),
        ("num_inference_steps", np.int8(50), 50),
        ("num_inference_steps", Tensor(4), 4),
        ("seed", np.array(5), 5),
        ("seed", np.uint32(2**32 - 1), 2**32 - 1),
        ("seed", np.array([3]), [3]),
        ("height", np.float32(64), 64),
        ("guidance_scale", np.float16(2), 2.0),
        ("guidance_scale", (2,), [2.0]),
        ("guidance_interval", [0.0, np.int64(3)], (0, 3)),
        ("callback_steps", np.int64(1), 1),
        ("progress_bar", np.False_, False),
        ("prompt", ("a", "b"), ["a", "b"]),
        ("prompt", np.array(["a"]), ["a"]),
        ("negative_prompt", [None], [None]),
        ("latents", LATENTS.tolist(), LATENTS),
        ("latents", Tensor(LATENTS), LATENTS),
        ("step_noise", np.zeros((50, 1, 8, 8, 4), np.float64), np.zeros((50, 1, 8, 8, 4))),
    ],
)
def test_what_is_plain_is_converted(pipes, argument, value, plain):
    found = getattr(TextToImageOptions(**{argument: value}), argument)
    assert type(found) is type(plain) and np.array_equal(found, plain)
    call = {**GOOD["text_to_image"], "sampler": "ddim", argument: value}
    if argument == "step_noise":
        call["num_inference_steps"] = 50
    assert pipes["text_to_image"](**call).images


@pytest.mark.parametrize("kind", ["image_to_image", "inpaint"])
def test_a_1_x_1_image(pipes, kind):
    small = {"image": IMAGE[:1, :1], "mask_image": MASK[:1, :1]}
    call = {name: small.get(name, value) for name, value in GOOD[kind].items()}
    (result,) = pipes[kind](**call).images
    assert result.size == (1, 1)


def test_dtypes_have_many_names():
    class bfloat16:  # as jax.numpy has it
        pass

    class Torch:
        def __repr__(self):
            return "torch.float32"

    assert LoadOptions(dtype=bfloat16).dtype == "bfloat16"
    assert LoadOptions(dtype=np.float32, param_dtype=np.dtype("float32")).dtype == "float32"
    assert LoadOptions(dtype={"movq": Torch()}).dtypes_of("movq") == ("float32", "float32")
    mixed = LoadOptions(dtype={"text_encoder": "float32"}, param_dtype="bfloat16")
    assert mixed.dtypes_of("text_projection") == ("float32", "bfloat16")
    assert mixed.dtypes_of("unet") == ("bfloat16", "bfloat16")


NOT_WHOLE = "it must be a whole number"
REFUSED = {
    "text_to_image": [
        (dict(height=100), "height is 100; it must be a positive multiple of 32"),
        (dict(height="64"), f"height is '64'; {NOT_WHOLE}"),
        (dict(width=0), "width is 0; it must be a positive multiple"),
        (dict(prompt=[]), "prompt is an empty list"),
        (dict(prompt=7), "prompt is 7; it must be a string or a list"),
        (dict(prompt=["a", 7]), "prompt 1 must be a string, not int"),
        (dict(prompt=[["a"]]), "prompt 0 must be a string, not list"),
        (dict(prompt=["a", "a", "a", None]), "prompt 3 must be a string, not NoneType"),
        (dict(prompt=["a", "a", "b\x00"]), "prompt 2 has the control character U+0000 at"),
        (dict(prompt="a\x00b"), "control character U+0000 at position 1"),
        (dict(prompt=None), "give prompt or prompt_embeds"),
        (dict(negative_prompt=["x", "y"]), "negative_prompt has 2 entries for 1 prompts"),
        (dict(prompt=["a"] * 3, negative_prompt=["a", "a", 5]), "negative_prompt 2 must be a str"),
        (dict(negative_prompt="a\x00"), "negative_prompt has the control character U+0000"),
        (dict(seed=[1, 2]), "seed has 2 entries for 1 images"),
        (dict(seed=-1), "seed -1 is not between"),
        (dict(seed=[1.7]), f"seed 0 is 1.7; {NOT_WHOLE}"),
        (dict(seed=True), f"seed is True; {NOT_WHOLE}"),
        (dict(seed=None), f"seed is None; {NOT_WHOLE}"),
        (dict(guidance_scale=-1.0), "guidance_scale is -1.0"),
        (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
        (dict(guidance_scale=[1, 2, 3]), "guidance_scale has 3 entries for 1 images"),
        (dict(num_inference_steps=0), "num_inference_steps is 0"),
        (dict(num_inference_steps=2.5), f"num_inference_steps is 2.5; {NOT_WHOLE}"),
        (dict(num_inference_steps="25"), f"num_inference_steps is '25'; {NOT_WHOLE}"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (dict(num_images_per_prompt=1.5), f"num_images_per_prompt is 1.5; {NOT_WHOLE}"),
        (dict(num_images_per_prompt=10**7), "num_images_per_prompt is 10000000"),
        (dict(sampler="euler"), "sampler is 'euler'; it must be one of"),
        (dict(output_type="pt"), "output_type is 'pt'; it must be one of"),
        (dict(eta=float("nan")), "eta is nan; it must be a finite number"),
        (dict(eta="0.5"), "eta is '0.5'; it must be a finite number"),
        (dict(latents=np.zeros((1, 4, 8, 8))), "latents has shape (1, 4, 8, 8)"),
        (dict(latents=np.full((1, 8, 8, 4), np.nan)), "latents holds 256 values that"),
        (dict(step_noise=np.zeros((2, 1, 8, 8, 4))), "this call needs (6, 1, 8, 8, 4)"),
        (dict(step_noise=np.full((6, 1), np.inf)), "step_noise holds 6 values that are not fin"),
        (dict(guidance_interval=(3, 1)), "guidance_interval is (3, 1)"),
        (dict(guidance_interval=(0.2, 0.8)), "guidance_interval is (0.2, 0.8)"),
        (dict(guidance_interval=(20, 30)), "of 6 steps, within (0, 5)"),
        (dict(guidance_interval=5), "guidance_interval is 5; it must be two whole numbers"),
        (dict(callback="x"), "callback is 'x'; it must be a function"),
        (dict(callback=print, callback_steps=0), "callback_steps is 0"),
        (dict(callback=print, callback_steps=1.5), f"callback_steps is 1.5; {NOT_WHOLE}"),
        (dict(prompt_embeds=np.zeros(3), prompt=None), "it must be what encode_prompt returns"),
        (dict(generator=1), "give seed, a whole number"),
        (dict(callback_on_step_end=print), "give callback"),
        (dict(num_inference_step=1), "did you mean num_inference_steps?"),
    ],
    "image_to_image": [
        (dict(strength=0.1), "strength 0.1 leaves none of 6 steps: give at least 0.1667"),
        (dict(strength=1.5), "strength is 1.5; it must be between 0 and 1"),
        (dict(strength=float("nan")), "strength is nan"),
        (dict(image=[IMAGE] * 3, strength=[0.5, 0.6]), "3 images and 2 strengths"),
        (dict(prompt=["a", "b"], image=[IMAGE] * 3), "2 prompts and 3 images: give one for all"),
        (dict(image=7), "image must be a path, bytes, a PIL image or an array, not int"),
        (dict(image="none.png"), "image: there is no file none.png"),
        (dict(image=[]), "image is an empty list"),
        (dict(image=np.zeros((10, 10_000, 3), np.uint8)), "10000 x 10 pixels: too long and thin"),
        (dict(max_area=100), "max_area is 100; it must be at least 32 x 32"),
        (dict(max_area=4096.5), f"max_area is 4096.5; {NOT_WHOLE}"),
        (dict(max_area=float("nan")), f"max_area is nan; {NOT_WHOLE}"),
        (dict(image_latents=LATENTS), "give image, or image_latents instead of it"),
        (dict(image=None, image_latents=LATENTS[0]), "image_latents has shape (8, 8, 4)"),
        (dict(image=None, image_latents=np.zeros((1, 8, 5, 4))), "width is 40"),
        (dict(image=None, image_latents=LATENTS + np.inf), "image_latents holds 256 values"),
        (dict(latents=np.zeros((1, 4, 8, 8))), "this call needs (1, 8, 8, 4)"),
        (dict(step_noise=np.zeros((6, 1, 8, 8, 4))), "this call needs (3, 1, 8, 8, 4)"),
        (dict(guidance_interval=(3, 6)), "guidance_interval is (3, 6); it must be two"),
        (dict(height=64), "a result has the size of its image"),
    ],
    "inpaint": [
        (dict(mask_image=None), "give mask_image"),
        (dict(image=None), "give image"),
        (dict(mask_image=np.ones((32, 64))), "mask_image is 64 x 32 pixels and its image 64 x 64"),
        (dict(mask_image=[MASK, MASK[:, 1:]], image=[IMAGE] * 2), "mask_image 1 is 63 x 64 pixels"),
        (dict(mask_image=-np.ones((64, 64))), "mask_image has values from -1 to -1; a mask is 0"),
        (dict(mask_image=np.full((64, 64), np.nan)), "mask_image has values that are not finite"),
        (dict(mask_image=7), "mask_image must be a path, bytes, a PIL image or an array, not int"),
        (dict(mask_image=[MASK] * 2, image=[IMAGE] * 3), "3 images and 2 masks: give one for all"),
        (dict(feather=-1), "feather is -1; it must be 0 or more"),
        (dict(feather=float("inf")), "feather is inf; it must be a finite number"),
        (dict(feather="8"), "feather is '8'; it must be a finite number"),
        (dict(strength=0), "strength is 0, which repaints nothing"),
        (dict(strength=0.1), "strength 0.1 leaves none of 6 steps"),
    ],
}


@pytest.mark.parametrize(
    "kind, change, words", [(kind, *row) for kind, rows in REFUSED.items() for row in rows]
)
def test_refusals(pipes, kind, change, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        pipes[kind](**{**GOOD[kind], **SAMPLING, **change})


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(
    "sampler, steps, message",
    [
        ("kandinsky", 501, "the sampler kandinsky makes 500 steps where 501 were asked for"),
        ("flash", 8, "the sampler flash makes 4 steps where 8 were asked for"),
        ("ddpm", 1, "the only step of the sampler ddpm is at time 1 of 1000"),
    ],
)
def test_other_steps_than_asked_for_are_a_warning(pipes, kind, sampler, steps, message):
    """At the line of the call."""
    call = {**GOOD[kind], "strength": 1, "sampler": sampler}
    call = {name: value for name, value in call.items() if name in option_fields(OPTIONS[kind])}
    with pytest.warns(StepCountWarning, match=message) as found:
        pipes[kind](**call, num_inference_steps=steps)
    assert len(found) == 1 and found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipes[kind](**call, num_inference_steps=4)


def test_a_truncated_prompt_is_named(pipes):
    long = "word " * 2000
    with pytest.warns(PromptTruncatedWarning) as found:
        pipes["text_to_image"](["a", "a", long], ["b", long + "x", "c"], height=64, width=64)
    starts = [str(warning.message).partition(" has ")[0] for warning in found]
    assert starts == ["prompt 2", "negative_prompt 1"]


@pytest.mark.parametrize(
    "latents, output_type, words",
    [
        (
            np.zeros((1, 4, 8, 8)),
            "pil",
            "(1, 4, 8, 8); it must be (b, h/8, w/8, 4)",
        ),
        (np.zeros((8, 8, 4)), "pil", "latents has shape (8, 8, 4)"),
        (np.zeros((0, 8, 8, 4)), "pil", "latents has shape (0, 8, 8, 4)"),
        (LATENTS + np.float32(np.inf), "np", "latents holds 256 values that are not finite"),
        (np.full((1, 8, 8, 4), 1e39), "np", "latents holds 256 values that are not finite"),
        (LATENTS, "latent", "output_type is 'latent'; it must be one of pil, np"),
        ("x", "pil", "latents is 'x'; it must be an array of numbers"),
    ],
)
def test_what_cannot_be_decoded(pipes, latents, output_type, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        pipes["text_to_image"].decode(latents, output_type)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(batch_size=0), "batch_size is 0; it must be 1 or more"),
        (dict(batch_size=12), "batch_size is 12, but the mesh splits a batch over 8 devices"),
        (dict(batch_size=4, mesh="tensor=-1", encoder_mesh="data=-1"), "over 8 devices"),
        (dict(dtype="fp16"), "dtype is 'fp16'; it must be bfloat16 or float32 (half precision"),
        (dict(param_dtype="int8"), "param_dtype is 'int8'; it must be bfloat16 or float32"),
        (dict(dtype={"vae": "float32"}), "dtype names 'vae', which is not one of text_encoder"),
        (dict(dtype={"movq": "float16"}), "dtype['movq'] is 'float16'"),
        (dict(components=["vae"]), "components names 'vae', which is not one of text_encoder"),
        (dict(mesh="data=3"), "takes 3 devices"),
        (dict(mesh=3), "mesh is 3; it must be a mesh"),
        (dict(attention="flash"), "attention is 'flash'; it must be one of auto, xla, kernel"),
        (dict(verify="yes"), "verify is 'yes'; it must be True or False"),
        (
            dict(int8_text_encoder=True, stream_text_encoder=True),
            "choose one of int8_text_encoder (--int8-text-encoder) and stream_text_encoder",
        ),
        (dict(torch_dtype="float32"), "torch_dtype is not an argument of k3jax: give dtype"),
        (dict(device_map="cuda"), "give mesh"),
    ],
)
def test_refusals_before_weights_are_read(monkeypatch, change, words):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "restore", read)
    monkeypatch.setattr(loading, "StreamedTextEncoder", read)
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        Kandinsky3Pipeline.from_pretrained("tiny", **change)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 70),
    st.sampled_from([64, 128, 10**20, 2**64, "pil", "ddpm", "image.png", "~\0"]),
    st.just(5000).map(lambda digits: -(10**digits)),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=8),
    st.characters(),
    st.binary(max_size=8),
    st.decimals(),
    st.fractions(),
    st.dates(),
    st.sampled_from(
        [object(), int, print, io.BytesIO(b"a"), io.StringIO("a"), pathlib.Path("none"), Tensor(2)]
    ),
    hypothesis.extra.numpy.scalar_dtypes().flatmap(
        lambda dtype: hypothesis.extra.numpy.from_dtype(dtype)
    ),
)
ARRAYS = hypothesis.extra.numpy.arrays(
    hypothesis.extra.numpy.scalar_dtypes(),
    hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
VALUES = st.one_of(
    SCALARS,
    ARRAYS,
    ARRAYS.map(Tensor),
    st.sampled_from([IMAGE, MASK, Image.new("RGB", (64, 64)), np.moveaxis(IMAGE, -1, 0)]),
    st.lists(SCALARS, max_size=3),
    st.tuples(SCALARS, SCALARS),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
    st.sets(st.integers(), max_size=2),
)
ARGUMENTS = [(kind, name) for kind, cls in OPTIONS.items() for name in option_fields(cls)]


@hypothesis.given(st.sampled_from(ARGUMENTS), VALUES)
@hypothesis.settings(
    derandomize=True,
    max_examples=800,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@pytest.mark.filterwarnings("ignore")
def test_any_value_is_a_picture_or_one_sentence(pipes, argument, value):
    """The sentence names the argument and comes from k3jax, before any work."""
    kind, name = argument
    call = {**GOOD[kind], "progress_bar": False, name: value}
    if name in ("prompt_embeds", "image_latents"):
        call[{"prompt_embeds": "prompt", "image_latents": "image"}[name]] = None
    try:
        made = pipes[kind](**call).images
    except (ValueError, TypeError) as error:
        text = str(error)
        assert len(text.splitlines()) <= 5 and len(text) < 1200
        assert name.removesuffix("_image") in text, (name, text)
        assert "k3jax" in traceback.extract_tb(error.__traceback__)[-1].filename, repr(error)
    else:
        assert len(made) >= 1
