# SPDX-License-Identifier: Apache-2.0
"""Names of the Flan-UL2 encoder; transformers' T5 names in every published layout."""

from k3jax.convert.rules import LINEAR, Rule, Table


ENCODER = "encoder.block.{n}.layer"

RULES = (
    Rule("shared.weight", "embed_tokens.embedding"),
    Rule("encoder.embed_tokens.weight", "embed_tokens.embedding", alias=True),
    Rule(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_attention_bias.embedding",
    ),
    Rule(f"{ENCODER}.0.layer_norm.weight", "layers.{n}.attention_norm.scale"),
    Rule(
        f"{ENCODER}.0.SelfAttention.{{p:q|k|v|o}}.weight", "layers.{n}.attention.{p}.kernel", LINEAR
    ),
    Rule(f"{ENCODER}.1.layer_norm.weight", "layers.{n}.mlp_norm.scale"),
    Rule(
        f"{ENCODER}.1.DenseReluDense.{{p:wi_0|wi_1|wo}}.weight",
        "layers.{n}.mlp.{p}.kernel",
        LINEAR,
    ),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)

# A full T5 (google/flan-ul2) brings its decoder along, which no Kandinsky uses.
IGNORED = ("decoder.{*}", "lm_head.weight")


def table() -> Table:
    """The encoder's table, the same for all dialects."""
    return Table("text_encoder", RULES, ignored=IGNORED)
