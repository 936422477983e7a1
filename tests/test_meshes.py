# SPDX-License-Identifier: Apache-2.0
"""Every mesh gives what one device gives.

    pytest -n 0 -m slow tests/test_meshes.py

By default only corners: each has another kind of mesh (one, two, three axes larger than 1), heads
that `tensor` divides and does not, and sizes down to 64 pixels. The slow tests take every way to
write 8 devices as data x fsdp x tensor.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from k3jax import Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline, Kandinsky3Pipeline
from k3jax.config import TextEncoderConfig
from k3jax.model.context import Context
from k3jax.sharding import MESH_AXES, RULES, TRAINING_RULES, batch_sharding, make_mesh, on_mesh

import tiny
from random_checkpoint import MODEL, VOCAB_SIZE, random_module, write_random_checkpoint


SIZES = (1, 2, 4, 8)
MESHES = [
    f"data={data},fsdp={fsdp},tensor={8 // data // fsdp}"
    for data in SIZES
    for fsdp in SIZES
    if data * fsdp <= 8
]
CORNERS = ["data=2,fsdp=2,tensor=2", "data=1,fsdp=2,tensor=4"]

# Levels of 1, 2 and 3 heads, self-attention in each of them.
UNET = dataclasses.replace(
    MODEL.unet,
    init_channels=16,
    block_out_channels=(16, 32, 48),
    groups=8,
    add_self_attention=(True,) * 4,
)
HEADS = dataclasses.replace(
    MODEL,
    unet=UNET,
    text_encoder=TextEncoderConfig(
        vocab_size=VOCAB_SIZE, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=3
    ),
)
SHALLOW = dataclasses.replace(HEADS, unet=dataclasses.replace(UNET, block_out_channels=(16, 48)))
BATCH_SIZE = 8
# Weights are gathered over fsdp, activations over tensor, or summed over it; nothing else.
STEP = {("all-gather", "fsdp"), ("all-gather", "tensor"), ("all-reduce", "tensor")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The packaged model, and random weights of a model with 1, 2 and 3 heads."""
    folder = tmp_path_factory.mktemp("heads") / "checkpoint"
    write_random_checkpoint(folder, HEADS)
    return {"tiny": "tiny", "heads": folder}


def load(checkpoint, spec, devices):
    mesh = make_mesh(spec, jax.devices()[:devices])
    return Kandinsky3Pipeline.from_pretrained(
        checkpoint, mesh=mesh, dtype="float32", batch_size=BATCH_SIZE
    )


def pictures(pipe, width, height, count, tasks):
    """uint8 images of each task, `count` of them."""
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    mask = Image.fromarray(np.uint8(255 * (np.arange(width) > width // 2) * np.ones((height, 1))))
    colors = ("red", "green", "blue", "white", "black", "yellow", "grey", "pink")
    prompt = [f"a {color} circle" for color in colors[:count]]
    common = dict(prompt=prompt, num_inference_steps=2, progress_bar=False)
    calls = {
        "text_to_image": lambda: pipe(height=height, width=width, **common),
        "img2img": lambda: Kandinsky3Img2ImgPipeline.from_pipe(pipe)(
            image=image, strength=0.5, **common
        ),
        "inpaint": lambda: Kandinsky3InpaintPipeline.from_pipe(pipe)(
            image=image, mask_image=mask, **common
        ),
    }
    return {task: np.stack([np.asarray(x) for x in calls[task]().images]) for task in tasks}


@pytest.fixture(scope="module")
def one_device(checkpoints):
    """What one device makes of the same calls, computed once each."""
    made, pipes = {}, {}

    def images(model, *call):
        if (model, call) not in made:
            if model not in pipes:
                pipes[model] = load(checkpoints[model], "data=1", 1)
            made[model, call] = pictures(pipes[model], *call)
        return made[model, call]

    return images


def check_pictures(checkpoints, one_device, model, spec, calls):
    pipe = load(checkpoints[model], spec, 8)
    for call in calls:
        for task, images in pictures(pipe, *call).items():
            off = np.abs(images.astype(int) - one_device(model, *call)[task]).max((1, 2, 3))
            assert (off <= 1).all(), (task, call, off)


TEXT, EVERY = ("text_to_image",), ("text_to_image", "img2img", "inpaint")


@pytest.mark.parametrize(
    "model, spec, call",
    [
        ("tiny", "data=2,fsdp=2,tensor=2", (64, 64, 8, TEXT)),
        pytest.param(
            *("heads", "data=1,fsdp=2,tensor=4", (64, 128, 3, TEXT)), marks=pytest.mark.slow
        ),
    ],
)
def test_pictures_on_corners(checkpoints, one_device, model, spec, call):
    check_pictures(checkpoints, one_device, model, spec, [call])


@pytest.mark.slow
@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("model", ["tiny", "heads"])
def test_pictures_on_every_mesh(checkpoints, one_device, model, spec):
    """Square and oblong, batches that fill the mesh and do not, every task."""
    calls = [(64, 64, 8, EVERY), (128, 64, 3, TEXT), (64, 192, 8, TEXT), (128, 128, 3, EVERY)]
    check_pictures(checkpoints, one_device, model, spec, calls)


def on_the_mesh(spec, function, module, arrays, rules=RULES):
    """(result, compiled program) of a function of a module and arrays, batch first."""
    mesh = make_mesh(spec)
    module = jax.device_put(module, tiny.module_shardings(module, mesh, rules))
    arrays = jax.device_put(arrays, batch_sharding(mesh))
    with on_mesh(mesh):
        compiled = jax.jit(function).lower(module, *arrays).compile()
    return compiled(module, *arrays), compiled


def close(found, expected):
    """Equal to float32 rounding, as a share of the largest value of all."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    largest = max(np.abs(np.asarray(b)).max() for _, b in pairs)
    return max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs) < 1e-4 * largest


def draws(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def unet_inputs(height, width, rows=8):
    x, states = draws((BATCH_SIZE, height, width, 4), (BATCH_SIZE, rows, 64))
    bias = np.where(np.arange(rows) < 3 + np.arange(BATCH_SIZE)[:, None] % 4, 0, -np.inf)
    lengths = np.full(BATCH_SIZE, rows, np.int32)
    context = Context(states, bias.astype(np.float32), lengths)
    return x, np.linspace(0, 999, BATCH_SIZE, dtype=np.float32), context


@pytest.fixture(scope="module")
def modules():
    rng = np.random.default_rng(1)
    made = {name: random_module(name, HEADS, rng) for name in ("movq", "text_encoder")}
    return made | {"unet": random_module("unet", SHALLOW, rng)}


def encode_and_decode(movq, images, latents):
    return movq.encode(images), movq.decode(latents)


def embed(encoder, ids, mask):
    return jnp.where(mask[..., None], encoder(ids, mask), 0)


def movq_inputs():
    return draws((BATCH_SIZE, 64, 128, 3), (BATCH_SIZE, 8, 16, 4))


def text_inputs():
    rng = np.random.default_rng(2)
    ids = rng.integers(0, VOCAB_SIZE, (BATCH_SIZE, 12))
    return ids, np.arange(12) < rng.integers(1, 12, (BATCH_SIZE, 1))


@pytest.mark.parametrize(
    "component, function, inputs, spec",
    [
        pytest.param(*case, spec, marks=() if spec == corner else pytest.mark.slow)
        for corner, case in (
            (CORNERS[0], ("movq", encode_and_decode, movq_inputs)),
            (CORNERS[1], ("text_encoder", embed, text_inputs)),
        )
        for spec in MESHES
    ],
)
def test_autoencoder_and_text_encoder(modules, component, function, inputs, spec):
    arrays = inputs()
    expected = jax.jit(function)(modules[component], *arrays)
    assert close(on_the_mesh(spec, function, modules[component], arrays)[0], expected)


def gradients(unet, x, timesteps, context):
    """The loss and its gradients, with every block computed twice, as in training."""
    graph, state = nnx.split(unet)

    def loss(state):
        module = nnx.merge(graph, state)
        module.remat = True
        return jnp.square(module(x, timesteps, context) - x).mean()

    return jax.value_and_grad(loss)(state)


@pytest.mark.parametrize(
    "spec",
    [CORNERS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in MESHES if s != CORNERS[0])],
)
def test_gradients(modules, spec):
    arrays = unet_inputs(4, 8)
    expected = jax.jit(gradients)(modules["unet"], *arrays)
    found, compiled = on_the_mesh(spec, gradients, modules["unet"], arrays, TRAINING_RULES)
    assert close(found, expected)
    if spec == CORNERS[0]:
        assert collectives(compiled, make_mesh(spec)) == {*STEP, ("all-reduce", "data", "fsdp")}


def collectives(compiled, mesh):
    """(kind, mesh axes that its groups span) of each collective of a program."""
    places = {device.id: index for index, device in np.ndenumerate(mesh.devices)}
    found = set()
    for line in compiled.as_text().splitlines():
        if kind := re.search(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", line):
            members = np.array([places[device] for device in group(line)])
            spread = (members != members[0]).any(0)
            found.add(
                (kind[1], *(name for name, wide in zip(MESH_AXES, spread, strict=True) if wide))
            )
    return found


def group(line):
    """One group of devices of a collective, in any of the ways in which HLO writes them."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return numbers(listed[1])
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=" + iota, line):
        return devices(tiled[2], tiled[3]).reshape(-1, int(tiled[1]))[0]
    sizes, dims, order, axes = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + iota + r"\))? \{([^}]*)\}", line
    ).groups()
    shape = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", sizes)}
    grid = devices(dims or str(np.prod(list(shape.values()))), order).reshape(list(shape.values()))
    along = [name in axes.split(",") for name in shape]
    return grid[tuple(slice(None) if wide else 0 for wide in along)].ravel()


def devices(dims, order):
    ids = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
    return ids.transpose(numbers(order) if order else None)


def numbers(text):
    return [int(number) for number in text.split(",")]


@pytest.mark.parametrize(
    "spec, size, kinds",
    [
        (CORNERS[0], (4, 8), STEP),
        pytest.param(CORNERS[0], (8, 16), STEP, marks=pytest.mark.slow),
        ("data=8", (4, 8), set()),
    ],
)
def test_the_collectives_of_a_step(modules, spec, size, kinds):
    """None is left to the partitioner's choice, whatever the size; data parallelism needs none."""
    arrays = unet_inputs(*size)
    expected = jax.jit(lambda unet, *xs: unet(*xs))(modules["unet"], *arrays)
    found, compiled = on_the_mesh(spec, lambda unet, *xs: unet(*xs), modules["unet"], arrays)
    assert close(found, expected)
    assert collectives(compiled, make_mesh(spec)) == kinds
