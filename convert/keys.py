# SPDX-License-Identifier: Apache-2.0
"""The key tables: PyTorch's parameter names and ours, for each component and dialect.

This is data only: rules.py is the engine that reads it in both directions, and templates.py
explains the braces. The dialects:

    diffusers     diffusers' and transformers' names
    original      github.com/ai-forever/Kandinsky-3, version 3.1
    original30    the same, version 3.0 (differs in the text projection only)
    fork          the authors' own names inside the diffusers layout (text projection only)

A new network that feeds the U-Net, or a new adapter, gets its rows here and a branch in `table`;
sources.py (reading) and to_torch.py (writing) name the file that holds it.
"""

from k3jax.convert.rules import (
    CONV,
    CONV_1X1_AS_LINEAR,
    CONV_TRANSPOSE,
    LINEAR,
    Rule,
    Table,
    dense,
    norm,
    under,
)


# --- text encoder -------------------------------------------------------------------------------

_LAYER = "encoder.block.{n}.layer"

TEXT_ENCODER = (
    Rule("shared.weight", "embed_tokens.embedding"),
    Rule("encoder.embed_tokens.weight", "embed_tokens.embedding", alias=True),
    Rule(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_attention_bias.embedding",
    ),
    Rule(f"{_LAYER}.0.layer_norm.weight", "layers.{n}.attention_norm.scale"),
    Rule(
        f"{_LAYER}.0.SelfAttention.{{p:q|k|v|o}}.weight", "layers.{n}.attention.{p}.kernel", LINEAR
    ),
    Rule(f"{_LAYER}.1.layer_norm.weight", "layers.{n}.mlp_norm.scale"),
    Rule(
        f"{_LAYER}.1.DenseReluDense.{{p:wi_0|wi_1|wo}}.weight", "layers.{n}.mlp.{p}.kernel", LINEAR
    ),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)

# A full T5 (google/flan-ul2) has a decoder too, which no Kandinsky uses.
T5_DECODER = ("decoder.{*}", "lm_head.weight")


# --- text projection ----------------------------------------------------------------------------
# diffusers keeps it inside the U-Net's file, Kandinsky 3.1 in a file of its own, 3.0 beside the
# U-Net in one file, and the authors' fork inside the U-Net.

NULL_EMBEDDING = Rule("null_embedding", "null_embedding")

TEXT_PROJECTION = {
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

# Where the projection is in the U-Net's file, the U-Net's table decides about the other tensors.
BESIDE_PROJECTION = {"diffusers": ("{*}",), "fork": ("{*}",)}


# --- U-Net --------------------------------------------------------------------------------------

RESNET_BLOCK = (
    *dense("resnet_blocks.{b}.group_norm.context_mlp.1", "blocks.{b}.norm.modulation", LINEAR),
    *dense("resnet_blocks.{b}.up_sample", "blocks.{b}.upsample", CONV_TRANSPOSE),
    *dense("resnet_blocks.{b}.projection", "blocks.{b}.conv", CONV),
    *dense("resnet_blocks.{b}.down_sample", "blocks.{b}.downsample", CONV),
    *dense("shortcut_up_sample", "shortcut_upsample", CONV_TRANSPOSE),
    *dense("shortcut_projection", "shortcut_conv", CONV),
    *dense("shortcut_down_sample", "shortcut_downsample", CONV),
)

ATTENTION = {
    "diffusers": (
        Rule("{p:to_q|to_k|to_v}.weight", "{p}.kernel", LINEAR),
        Rule("to_out.0.weight", "to_out.kernel", LINEAR),
    ),
    "original": (
        Rule(
            "{p:to_query|to_key|to_value|output_layer}.weight",
            "{p:to_q|to_k|to_v|to_out}.kernel",
            LINEAR,
        ),
    ),
}


def _attention_block(dialect):
    return (
        *dense("{p:in_norm|out_norm}.context_mlp.1", "{p}.modulation", LINEAR),
        *under("attention", "attention", ATTENTION[dialect]),
        Rule("feed_forward.0.weight", "feed_forward_in.kernel", CONV_1X1_AS_LINEAR),
        Rule("feed_forward.2.weight", "feed_forward_out.kernel", CONV_1X1_AS_LINEAR),
    )


_OURS = "{side:down_blocks|up_blocks}.{l}"
_THEIRS = "{side:down_samples|up_samples}.{l}"

UNET = {
    "diffusers": (
        *dense("time_embedding.{p:linear_1|linear_2}", "time_embedding.{p}", LINEAR),
        *under("add_time_condition.attention", "context_pooling.attention", ATTENTION["diffusers"]),
        *dense("conv_in", "conv_in", CONV),
        *under(f"{_OURS}.attentions.0", f"{_OURS}.self_attention", _attention_block("diffusers")),
        *under(
            f"{_OURS}.attentions.{{j+1}}",
            f"{_OURS}.cross_attentions.{{j}}",
            _attention_block("diffusers"),
        ),
        *under(
            f"{_OURS}.{{r:resnets_in|resnets_out}}.{{j}}",
            f"{_OURS}.{{r:resnets_in|resnets_out}}.{{j}}",
            RESNET_BLOCK,
        ),
        *norm("conv_norm_out", "norm_out"),
        *dense("conv_out", "conv_out", CONV),
    ),
    "original": (
        *dense("to_time_embed.{p:1|3}", "time_embedding.{p:linear_1|linear_2}", LINEAR),
        *under("feature_pooling.attention", "context_pooling.attention", ATTENTION["original"]),
        *dense("in_layer", "conv_in", CONV),
        *under(
            f"{_THEIRS}.self_attention_block",
            f"{_OURS}.self_attention",
            _attention_block("original"),
        ),
        *under(
            f"{_THEIRS}.resnet_attn_blocks.{{j}}.1",
            f"{_OURS}.cross_attentions.{{j}}",
            _attention_block("original"),
        ),
        *under(
            f"{_THEIRS}.resnet_attn_blocks.{{j}}.{{r:0|2}}",
            f"{_OURS}.{{r:resnets_in|resnets_out}}.{{j}}",
            RESNET_BLOCK,
        ),
        *norm("out_layer.0", "norm_out"),
        *dense("out_layer.2", "conv_out", CONV),
    ),
}

# The text projection inside these files is a component of its own.
PROJECTION_IN_UNET = {
    "diffusers": (
        "encoder_hid_proj.projection_linear.weight",
        "encoder_hid_proj.projection_norm.weight",
        "encoder_hid_proj.projection_norm.bias",
    ),
    "original": ("projection_lin.weight", "projection_ln.weight", "projection_ln.bias"),
}


# --- MoVQ ---------------------------------------------------------------------------------------

SPATIAL_NORM = (
    *norm("norm_layer", "norm"),
    *dense("{c:conv_y|conv_b}", "{c}", CONV_1X1_AS_LINEAR),
)


def _movq_norm(torch_name, jax_name, half, dialect):
    """A norm of the encoder (plain) or of the decoder (spatial, with two 1x1 convolutions)."""
    if half == "decoder":
        return under(torch_name, jax_name, SPATIAL_NORM)
    return norm(f"{torch_name}.norm_layer" if dialect == "original" else torch_name, jax_name)


def _movq_resnet(half, dialect):
    shortcut = {"diffusers": "conv_shortcut", "original": "nin_shortcut"}[dialect]
    return (
        *_movq_norm("{k:norm1|norm2}", "{k:norm1|norm2}", half, dialect),
        *dense("{k:conv1|conv2}", "{k}", CONV),
        *dense(shortcut, "conv_shortcut", CONV),
    )


def _movq_attention(half, dialect):
    if dialect == "original":
        return (
            *_movq_norm("norm", "norm", half, dialect),
            *dense("{p:q|k|v|proj_out}", "{p:to_q|to_k|to_v|to_out}", CONV_1X1_AS_LINEAR),
        )
    name = {"encoder": "group_norm", "decoder": "spatial_norm"}[half]
    return (
        *_movq_norm(name, "norm", half, dialect),
        *dense("{p:to_q|to_k|to_v}", "{p}", LINEAR),
        *dense("to_out.0", "to_out", LINEAR),
    )


def _movq_half(half, dialect):
    """Encoder or decoder. The original numbers the decoder's levels from the shallowest, we in the
    order of use."""
    blocks, sampler = {"encoder": ("down", "downsample"), "decoder": ("up", "upsample")}[half]
    resnet, attention = _movq_resnet(half, dialect), _movq_attention(half, dialect)
    ours = f"{blocks}_blocks.{{i}}"
    if dialect == "diffusers":
        places = (
            *under(f"{ours}.resnets.{{j}}", f"{ours}.resnets.{{j}}", resnet),
            *under(f"{ours}.attentions.{{j}}", f"{ours}.attentions.{{j}}", attention),
            *dense(f"{ours}.{sampler}rs.0.conv", f"{ours}.{sampler}", CONV),
            *under("mid_block.resnets.{j}", "mid_block.resnets.{j}", resnet),
            *under("mid_block.attentions.0", "mid_block.attentions.0", attention),
            *_movq_norm("conv_norm_out", "norm_out", half, dialect),
        )
    else:
        theirs = "down.{i}" if half == "encoder" else "up.{last-i}"
        places = (
            *under(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}", resnet),
            *under(f"{theirs}.attn.{{j}}", f"{ours}.attentions.{{j}}", attention),
            *dense(f"{theirs}.{sampler}.conv", f"{ours}.{sampler}", CONV),
            *under("mid.block_{j+1}", "mid_block.resnets.{j}", resnet),
            *under("mid.attn_1", "mid_block.attentions.0", attention),
            *_movq_norm("norm_out", "norm_out", half, dialect),
        )
    return under(half, half, (*dense("{c:conv_in|conv_out}", "{c}", CONV), *places))


def _movq(dialect):
    latent_convs = dense("{c:quant_conv|post_quant_conv}", "{c}", CONV)
    return (*_movq_half("encoder", dialect), *_movq_half("decoder", dialect), *latent_convs)


MOVQ = {
    "diffusers": (*_movq("diffusers"), Rule("quantize.embedding.weight", "codebook.embedding")),
    "original": _movq("original"),
}


def table(component: str, dialect: str = "diffusers", *, levels: int = 4) -> Table:
    """The table of a component.

    Args:
        dialect: see above. The text encoder has one for all layouts; `original30` is `original`
            where the two do not differ.
        levels: resolutions of the MoVQ, whose original names count from the other end.
    """
    base = "original" if dialect == "original30" else dialect
    if component == "text_encoder":
        return Table(component, TEXT_ENCODER, ignored=T5_DECODER)
    if component == "text_projection":
        rows, ignored = TEXT_PROJECTION[dialect], BESIDE_PROJECTION.get(dialect, ())
        return Table(component, rows, ignored=ignored)
    if component == "unet":
        return Table(component, UNET[base], ignored=PROJECTION_IN_UNET[base])
    return Table(component, MOVQ[base], constants={"last": levels - 1})
