# SPDX-License-Identifier: Apache-2.0
"""Names of the U-Net in diffusers' dialect and in that of the original repository (3.0 and 3.1)."""

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


OURS = "{side:down_blocks|up_blocks}.{l}"
THEIRS = "{side:down_samples|up_samples}.{l}"

DIFFUSERS = (
    *dense("time_embedding.{p:linear_1|linear_2}", "time_embedding.{p}", LINEAR),
    *under("add_time_condition.attention", "context_pooling.attention", ATTENTION["diffusers"]),
    *dense("conv_in", "conv_in", CONV),
    *under(f"{OURS}.attentions.0", f"{OURS}.self_attention", _attention_block("diffusers")),
    *under(
        f"{OURS}.attentions.{{j+1}}",
        f"{OURS}.cross_attentions.{{j}}",
        _attention_block("diffusers"),
    ),
    *under(
        f"{OURS}.{{r:resnets_in|resnets_out}}.{{j}}",
        f"{OURS}.{{r:resnets_in|resnets_out}}.{{j}}",
        RESNET_BLOCK,
    ),
    *norm("conv_norm_out", "norm_out"),
    *dense("conv_out", "conv_out", CONV),
)

ORIGINAL = (
    *dense("to_time_embed.{p:1|3}", "time_embedding.{p:linear_1|linear_2}", LINEAR),
    *under("feature_pooling.attention", "context_pooling.attention", ATTENTION["original"]),
    *dense("in_layer", "conv_in", CONV),
    *under(
        f"{THEIRS}.self_attention_block", f"{OURS}.self_attention", _attention_block("original")
    ),
    *under(
        f"{THEIRS}.resnet_attn_blocks.{{j}}.1",
        f"{OURS}.cross_attentions.{{j}}",
        _attention_block("original"),
    ),
    *under(
        f"{THEIRS}.resnet_attn_blocks.{{j}}.{{r:0|2}}",
        f"{OURS}.{{r:resnets_in|resnets_out}}.{{j}}",
        RESNET_BLOCK,
    ),
    *norm("out_layer.0", "norm_out"),
    *dense("out_layer.2", "conv_out", CONV),
)

RULES = {"diffusers": DIFFUSERS, "original": ORIGINAL}

# The text projection inside these files is a component of its own (text_projection.py).
IGNORED = {
    "diffusers": (
        "encoder_hid_proj.projection_linear.weight",
        "encoder_hid_proj.projection_norm.weight",
        "encoder_hid_proj.projection_norm.bias",
    ),
    "original": ("projection_lin.weight", "projection_ln.weight", "projection_ln.bias"),
}


def table(dialect: str) -> Table:
    """The U-Net's table in the dialect `diffusers` or `original`."""
    return Table("unet", RULES[dialect], ignored=IGNORED[dialect])
