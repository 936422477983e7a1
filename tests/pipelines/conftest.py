# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of diffusers and ours with the same random weights, for all tests of the tasks.

PyTorch takes ten seconds to import: only the fixtures that need it do.
"""

import warnings

import jax
import pytest

from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sharding import make_mesh

from pictures import SCHEDULER
from random_checkpoint import write_byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def theirs(tokenizer_folder):
    """diffusers' image to image."""
    from diffusers import DDPMScheduler
    from diffusers import Kandinsky3Img2ImgPipeline as TorchImg2Img
    from transformers import AutoTokenizer

    import tiny

    pipe = TorchImg2Img(
        AutoTokenizer.from_pretrained(tokenizer_folder),
        tiny.torch_text_encoder(),
        tiny.torch_unet(tiny.SHALLOW_UNET),
        DDPMScheduler(**SCHEDULER),
        tiny.torch_movq(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def base(theirs, tokenizer_folder):
    """Our text to image with those weights, on one device."""
    import tiny

    unet = theirs.unet.state_dict()
    projection = {k: unet.pop(k) for k in list(unet) if k.startswith("encoder_hid_proj")}
    states = {
        "text_encoder": theirs.text_encoder.state_dict(),
        "text_projection": projection,
        "unet": unet,
        "movq": theirs.movq.state_dict(),
    }
    modules = {name: tiny.ours(name, tiny.SHALLOW, state) for name, state in states.items()}
    mesh = make_mesh(devices=jax.devices()[:1])
    modules = jax.device_put(modules, jax.devices()[0])
    return Kandinsky3Pipeline(tiny.SHALLOW, Tokenizer(tokenizer_folder), modules, mesh)


@pytest.fixture(scope="session")
def img2img(base):
    return Kandinsky3Img2ImgPipeline.from_pipe(base)


@pytest.fixture(scope="session")
def blend(base):
    """Inpainting with 4 channels."""
    return Kandinsky3InpaintPipeline.from_pipe(base)


@pytest.fixture
def strict():
    """Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
