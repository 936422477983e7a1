# SPDX-License-Identifier: Apache-2.0
"""Names of the projection from the text encoder's width to the U-Net's, and the null embedding.

diffusers keeps the projection inside the U-Net's file, Kandinsky 3.1 in a file of its own, 3.0 next
to the U-Net in one file, and the authors' fork inside the U-Net under other names.
"""

from k3jax.convert.rules import LINEAR, Rule, Table, norm


NULL_EMBEDDING = Rule("null_embedding", "null_embedding")

DIALECTS = {
    "diffusers": (
        Rule("encoder_hid_proj.projection_linear.weight", "linear.kernel", LINEAR),
        *norm("encoder_hid_proj.projection_norm", "norm"),
    ),
    "original": (Rule("0.weight", "linear.kernel", LINEAR), *norm("1", "norm"), NULL_EMBEDDING),
    "original30": (
        Rule("t5.0.weight", "linear.kernel", LINEAR),
        *norm("t5.1", "norm"),
        NULL_EMBEDDING,
    ),
    "fork": (
        Rule("projection_lin.weight", "linear.kernel", LINEAR),
        *norm("projection_ln", "norm"),
        NULL_EMBEDDING,
    ),
}

# Where the projection lies in the U-Net's file, the U-Net's table answers for the other tensors.
IGNORED = {"diffusers": ("{*}",), "fork": ("{*}",)}


def table(dialect: str) -> Table:
    """The projection's table in the dialect `diffusers`, `original`, `original30` or `fork`."""
    return Table("text_projection", DIALECTS[dialect], ignored=IGNORED.get(dialect, ()))
