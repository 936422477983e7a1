# SPDX-License-Identifier: Apache-2.0
"""Maps in strips: how MoVQ's decoder lays out one image on a TPU.

A TPU's compiler has a hard time with one image of a million pixels. It cuts such a map along its
width before every 3x3 convolution and joins it afterwards, and writes out what is enlarged
from the latents at full size: more time goes into copies than into arithmetic. So we cut it once,
along its height, and let the strips be the batch: (b, h, w, c) is (b strips, h/strips, w, c) from
the latents to the image. With eight strips the compiler puts the strip and the channel into the
tiles of its memory; height and width are then whole steps of it, along which it enlarges for
nothing. All values are those of the map in one piece: rows at the edge of a strip see the rows of
the strip beside it. Where the mesh has a `tensor` axis, its devices share the strips of an image.

By the schedules of libtpu 0.0.42.1 for a v5e, a norm and a 3x3 convolution of 1024x1024x256 take
8.3 ms so, and 19.5 in one piece; the convolution alone is 6.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from k3jax.model.layers import convolve
from k3jax.sharding import constrain, gathered, traced_mesh


STRIP_MAP = ("strips", None, None, None)
"""Logical axes of a map in strips: each device has whole strips, with all of their channels."""
STRIPS = 8
"""Of a device: as many as a tile has rows."""
LEAST_PIXELS = 32
"""Height of latents; below that an image is small enough in one piece."""


def strips_on_tpu(latents: jax.Array) -> int:
    """Strips that an image is cut into for latents (b, h, w, 4); 1: none.

    Devices along the mesh's `tensor` axis have eight each, of the same image. Eight images or more
    on a device are a batch by themselves.
    """
    b, height = latents.shape[:2]
    images, beside = _devices()
    if b >= STRIPS * images or height < LEAST_PIXELS:
        return 1
    # Strips that do not divide over the devices beside would all be decoded by each of them.
    counts = (STRIPS * beside, STRIPS) if STRIPS % beside == 0 else (STRIPS * beside,)
    return next((n for n in counts if height % n == 0 and height >= 2 * n), 1)


def into_strips(x: jax.Array, strips: int) -> jax.Array:
    """(b, h, w, c) -> (b strips, h/strips, w, c), split over all axes of the mesh that is set."""
    b, h, w, c = x.shape
    if strips == 1:
        return x
    return constrain(x.reshape(b * strips, h // strips, w, c), *STRIP_MAP)


def out_of_strips(x: jax.Array, strips: int) -> jax.Array:
    """(b strips, h, w, c) -> (b, strips h, w, c)."""
    b, h, w, c = x.shape
    return constrain(x.reshape(b // strips, strips * h, w, c), "batch", None, None, None)


def convolve_strips(layer: nnx.Conv, x: jax.Array, strips: int) -> jax.Array:
    """A convolution of 1x1 or 3x3 (padding 1) of a map in strips of two rows or more.

    Every strip is convolved by itself, and then its first and its last row once more, with the row
    beside it: they are few, and nothing that is large is copied.
    """
    kernel = gathered(layer.kernel, layer.dtype, whole=True)
    bias = layer.bias[...].astype(layer.dtype)
    x = x.astype(layer.dtype)

    def convolved(x, rows, columns):
        y = convolve(x, kernel, ((rows, rows), (columns, columns)))
        return constrain(bias + y, *STRIP_MAP)

    if kernel.shape[0] == 1:
        return convolved(x, 0, 0)
    above, below = _beside(x, strips)
    first = convolved(jnp.concatenate([above, x[:, :2]], axis=1), 0, 1)
    last = convolved(jnp.concatenate([x[:, -2:], below], axis=1), 0, 1)
    out = jax.lax.dynamic_update_slice_in_dim(convolved(x, 1, 1), first, 0, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(out, last, x.shape[1] - 1, axis=1)


def convolve_enlarged_strips(layer: nnx.Conv, x: jax.Array, strips: int) -> jax.Array:
    """`movq_blocks.convolve_upsampled` of a map in strips.

    The four places of a pixel are one transposed convolution of 4x4 with a stride of 2: a TPU skips
    its zeros, and writes the pixels where they belong.
    """
    kernels = window_sums(gathered(layer.kernel, whole=True))
    kernel = rearrange(kernels, "down right y x i o -> (y down) (x right) i o").astype(layer.dtype)
    above, below = _beside(x, strips)
    x = jnp.concatenate([above, x, below], axis=1).astype(layer.dtype)
    bias = layer.bias[...].astype(layer.dtype)
    return constrain(bias + convolve(x, kernel, ((0, 0), (2, 2)), lhs_dilation=(2, 2)), *STRIP_MAP)


def enlarge_and_apply(
    function: Callable[..., jax.Array],
    x: jax.Array,
    smaller: tuple[jax.Array, ...],
    per_channel: tuple[jax.Array, ...],
) -> jax.Array:
    """function(x, *smaller, *per_channel), element by element, without enlarging anything.

    Args:
        x: (b, h, w, c).
        smaller: (b, h/f, w/f, c) each, to be enlarged by nearest neighbours.
        per_channel: (b, 1, 1, c) each.
    """
    b, h, w, c = x.shape
    rows, columns = smaller[0].shape[1:3]
    # Otherwise the compiler converts x to float32 before it reshapes it, and writes that out.
    x = jax.lax.optimization_barrier(x.reshape(b, rows, h // rows, columns, w // columns, c))
    y = function(
        x,
        *(small[:, :, None, :, None] for small in smaller),
        *(value[:, :, None, :, None] for value in per_channel),
    )
    # Else the compiler moves the reshape to the front, and enlarges in memory.
    return jax.lax.optimization_barrier(y).reshape(b, h, w, c)


def window_sums(kernel: jax.Array) -> jax.Array:
    """(3, 3, in, out) -> float32 (2, 2, 2, 2, in, out): place (down, right), its 2x2 kernel.

    What a 3x3 convolution of an enlarged map is at each of the four places of a pixel.
    """
    # Of the three rows in a window at place 0, the first is in the pixel of x above and two are in
    # its own; at place 1 two are in its own and the last in the pixel below.
    sums = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    kernel = kernel.astype(jnp.float32)
    return jnp.einsum("dyr, exs, rsio -> deyxio", sums, sums, kernel, precision=highest)


def _devices() -> tuple[int, int]:
    """How many hold images of their own, and how many share an image; 1 and 1 without a mesh."""
    mesh = traced_mesh()
    if mesh is None:
        return 1, 1
    return mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]


def _beside(x: jax.Array, strips: int) -> tuple[jax.Array, jax.Array]:
    """The row above each strip and the one below, zeros outside of the image: (b, 1, w, c) each."""
    b, h, w, c = x.shape
    x = x.reshape(b // strips, strips, h, w, c)
    outside = jnp.zeros_like(x[:, :1, :1])
    above = jnp.concatenate([outside, x[:, :-1, -1:]], axis=1)
    below = jnp.concatenate([x[:, 1:, :1], outside], axis=1)
    return tuple(constrain(row.reshape(b, 1, w, c), *STRIP_MAP) for row in (above, below))
