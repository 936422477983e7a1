# SPDX-License-Identifier: Apache-2.0
"""A batch that cannot fit is refused before anything runs, with the largest that can."""

import jax
import pytest
from PIL import Image

from k3jax.pipelines import memory
from k3jax.pipelines.call_inputs import CallInputs
from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline

from stubs import CONFIG, pipeline


class Began(Exception):
    """All checks are passed."""


OF_IMAGE = int(memory.MAPS * 16 * 16 * CONFIG.unet.block_out_channels[0] * 2)  # 128x128, bfloat16


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that each device says are free."""
    monkeypatch.setattr(CallInputs, "encode", began)
    return lambda size: monkeypatch.setattr(memory, "free_memory", lambda device: size)


def began(self, *arguments):
    raise Began


def test_the_largest_batch_is_named(free):
    pipe = pipeline(Kandinsky3Pipeline)
    free(8 * OF_IMAGE)
    with pytest.raises(Began):
        pipe("a cat")
    free(8 * OF_IMAGE - 1)
    with pytest.raises(ValueError, match="batch_size that can fit is 3"):
        pipe("a cat")
    with pytest.raises(Began):  # half as much without guidance
        pipe("a cat", guidance_scale=0)
    free(None)  # a device that does not tell
    with pytest.raises(Began):
        pipe("a cat")


def test_cpus_have_the_memory_of_the_machine(free, monkeypatch, tmp_path):
    """Swap included, and all of them the same."""
    free(None)
    file = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", file)

    def meminfo(total):
        rows = ("MemTotal", total // 1024 - 5), ("MemFree", 1), ("SwapTotal", 5)
        text = "".join(f"{name}:  {size} kB\n" for name, size in rows)
        file.write_text(text + "HugePages_Total: 0\n")

    meminfo(8 * OF_IMAGE)
    with pytest.raises(Began):
        pipeline(Kandinsky3Pipeline)("a cat")
    meminfo(8 * OF_IMAGE - 1024)
    with pytest.raises(
        ValueError, match=r"all the memory of the machine: the largest .* can fit is 3"
    ):
        pipeline(Kandinsky3Pipeline)("a cat")
    meminfo(16 * OF_IMAGE)
    with pytest.raises(Began):
        pipeline(Kandinsky3Pipeline, mesh="data=2", devices=2, batch_size=8)("a cat")
    meminfo(16 * OF_IMAGE - 1024)
    with pytest.raises(ValueError, match=r"machine for each of 2: the largest .* fit is 6"):
        pipeline(Kandinsky3Pipeline, mesh="data=2", devices=2, batch_size=8)("a cat")
    meminfo(OF_IMAGE)
    with pytest.raises(ValueError, match=r"one image fits: choose a smaller size\.$"):
        pipeline(Kandinsky3Pipeline)("a cat")
    file.unlink()  # no Linux
    with pytest.raises(Began):
        pipeline(Kandinsky3Pipeline)("a cat")


def test_this_machine():
    assert memory.machine_memory() > 2**28


def test_not_even_one(free):
    free(OF_IMAGE)
    with pytest.raises(ValueError, match="not even one image fits"):
        pipeline(Kandinsky3Pipeline)("a cat", height=128, width=256)


@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2", "data=2,tensor=2"])
def test_meshes(free, mesh):
    """Devices along `data` and `fsdp` have images of their own; along `tensor` they share them."""
    free(4 * OF_IMAGE)
    with pytest.raises(Began):
        pipeline(Kandinsky3Pipeline, mesh=mesh, devices=4, batch_size=8)("a cat")
    with pytest.raises(ValueError, match="batch_size that can fit is 8"):
        pipeline(Kandinsky3Pipeline, mesh=mesh, devices=4, batch_size=12)("a cat")


def test_images_of_several_sizes(free):
    """The largest decides, of those that take a step."""
    pipe = pipeline(Kandinsky3Img2ImgPipeline, batch_size=2)
    images = [Image.new("RGB", size) for size in ((64, 64), (128, 128))]
    free(4 * OF_IMAGE - 1)
    with pytest.raises(ValueError, match="batch_size 2 of 128x128"):
        pipe("a cat", images, strength=0.5)
    with pytest.raises(Began):
        pipe("a cat", images, strength=[0.5, 0.0])


def test_what_a_device_says():
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory.free_memory(Device({"bytes_limit": 10, "bytes_in_use": 4})) == 6
    assert memory.free_memory(Device({"bytes_limit": 10})) == 10
    assert memory.free_memory(Device(None)) is None
    assert memory.free_memory(jax.devices()[0]) is None  # a CPU
