# SPDX-License-Identifier: Apache-2.0
"""What a kernel of a TPU program is there for, so that its time can be told from that of others."""

from typing import Literal

from k3jax.planning.hlo import Instruction, Module


Kind = Literal["products", "attention", "reductions", "element-wise", "copies"]
"""products: matrix products and convolutions, with all that is fused to them. attention: Pallas
kernels; we have no others. copies: the same values elsewhere or in another order."""

MOVES = frozenset(
    "bitcast broadcast concatenate constant copy dynamic-slice dynamic-update-slice fusion gather "
    "get-tuple-element iota pad parameter reshape reverse slice transpose tuple".split()
)


def kind_of(module: Module, instruction: Instruction, flops: float) -> Kind:
    """Of a kernel with that many FLOPs of matrix products and convolutions."""
    if instruction.op == "custom-call" and "tpu_custom_call" in instruction.attributes:
        return "attention"
    if flops:
        return "products"
    operations = {instruction.op}
    for name in instruction.called:
        operations |= module.operations(name)
    if operations & {"reduce", "reduce-window"}:
        return "reductions"
    # A pad is put over another map by the larger of the two.
    moves = MOVES | {"maximum"} if "pad" in operations else MOVES
    return "copies" if operations <= moves else "element-wise"
