# SPDX-License-Identifier: Apache-2.0
"""Names of the MoVQ autoencoder in diffusers' dialect and in that of the original repository."""

from k3jax.convert.rules import CONV, CONV_1X1_AS_LINEAR, LINEAR, Rule, Table, dense, norm, under


SPATIAL_NORM = (
    *norm("norm_layer", "norm"),
    *dense("{c:conv_y|conv_b}", "{c}", CONV_1X1_AS_LINEAR),
)


def _norm(torch_name, jax_name, half, dialect):
    """A norm of the encoder (plain) or of the decoder (spatial, with two 1x1 convolutions)."""
    if half == "decoder":
        return under(torch_name, jax_name, SPATIAL_NORM)
    return norm(f"{torch_name}.norm_layer" if dialect == "original" else torch_name, jax_name)


def _resnet(half, dialect):
    shortcut = {"diffusers": "conv_shortcut", "original": "nin_shortcut"}[dialect]
    return (
        *_norm("{k:norm1|norm2}", "{k:norm1|norm2}", half, dialect),
        *dense("{k:conv1|conv2}", "{k}", CONV),
        *dense(shortcut, "conv_shortcut", CONV),
    )


def _attention(half, dialect):
    if dialect == "original":
        return (
            *_norm("norm", "norm", half, dialect),
            *dense("{p:q|k|v|proj_out}", "{p:to_q|to_k|to_v|to_out}", CONV_1X1_AS_LINEAR),
        )
    return (
        *_norm({"encoder": "group_norm", "decoder": "spatial_norm"}[half], "norm", half, dialect),
        *dense("{p:to_q|to_k|to_v}", "{p}", LINEAR),
        *dense("to_out.0", "to_out", LINEAR),
    )


def _half_diffusers(half, blocks, sampler):
    resnet, attention = _resnet(half, "diffusers"), _attention(half, "diffusers")
    return (
        *dense("{c:conv_in|conv_out}", "{c}", CONV),
        *under(f"{blocks}.{{i}}.resnets.{{j}}", f"{blocks}.{{i}}.resnets.{{j}}", resnet),
        *under(f"{blocks}.{{i}}.attentions.{{j}}", f"{blocks}.{{i}}.attentions.{{j}}", attention),
        *dense(f"{blocks}.{{i}}.{sampler}rs.0.conv", f"{blocks}.{{i}}.{sampler}", CONV),
        *under("mid_block.resnets.{j}", "mid_block.resnets.{j}", resnet),
        *under("mid_block.attentions.0", "mid_block.attentions.0", attention),
        *_norm("conv_norm_out", "norm_out", half, "diffusers"),
    )


def _half_original(half, level, blocks, sampler):
    resnet, attention = _resnet(half, "original"), _attention(half, "original")
    return (
        *dense("{c:conv_in|conv_out}", "{c}", CONV),
        *under(f"{level}.block.{{j}}", f"{blocks}.{{i}}.resnets.{{j}}", resnet),
        *under(f"{level}.attn.{{j}}", f"{blocks}.{{i}}.attentions.{{j}}", attention),
        *dense(f"{level}.{sampler}.conv", f"{blocks}.{{i}}.{sampler}", CONV),
        *under("mid.block_{j+1}", "mid_block.resnets.{j}", resnet),
        *under("mid.attn_1", "mid_block.attentions.0", attention),
        *_norm("norm_out", "norm_out", half, "original"),
    )


LATENT_CONVS = dense("{c:quant_conv|post_quant_conv}", "{c}", CONV)

DIFFUSERS = (
    *under("encoder", "encoder", _half_diffusers("encoder", "down_blocks", "downsample")),
    *under("decoder", "decoder", _half_diffusers("decoder", "up_blocks", "upsample")),
    *LATENT_CONVS,
    Rule("quantize.embedding.weight", "codebook.embedding"),
)

# The original numbers the decoder's levels from the shallowest, ours stand in the order of use.
ORIGINAL = (
    *under(
        "encoder", "encoder", _half_original("encoder", "down.{i}", "down_blocks", "downsample")
    ),
    *under("decoder", "decoder", _half_original("decoder", "up.{last-i}", "up_blocks", "upsample")),
    *LATENT_CONVS,
)

RULES = {"diffusers": DIFFUSERS, "original": ORIGINAL}


def table(dialect: str, levels: int = 4) -> Table:
    """The MoVQ's table in the dialect `diffusers` or `original`.

    Args:
        levels: resolutions of the model; the original names count from the other end.
    """
    return Table("movq", RULES[dialect], constants={"last": levels - 1})
