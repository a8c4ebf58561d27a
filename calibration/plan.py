"""What happens to each input of a decoder layer: the scheme, read through the family's tree, checked before work."""

from dataclasses import dataclass

from torch import Tensor, nn

from atom.models.family import Family, InputGroup
from atom.models.layers import DecoderLayer
from atom.models.layout import group_scheme, layer_prefix
from atom.quant.rotation import hadamard, unrotate
from atom.quant.schemes import LinearScheme, Scheme


@dataclass
class InputPlan:
    """One input group of one layer.

    linear    what all its linears share: activation, outliers, rotation, reorder
    schemes   of each linear by its name in the layer; they may differ in `weight`
    perm      [K] int64, set once the energies are known; None keeps the order
    """

    group: InputGroup
    linear: LinearScheme
    schemes: dict[str, LinearScheme]
    perm: Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        return self.linear.weight is not None

    @property
    def needs_order(self) -> bool:
        return self.is_quantized and self.linear.reorder


def plan_layer(family: Family, scheme: Scheme, index: int) -> list[InputPlan]:
    """The plans of decoder layer `index`. Raises UnsupportedError where linears with one input want it different."""
    prefix = layer_prefix(index)
    return [
        InputPlan(
            group,
            group_scheme(family, scheme, prefix, group.name),
            {name: scheme.for_linear(f"{prefix}.{name}") for name in group.linears},
        )
        for group in family.groups
    ]


def check_sizes(plans: list[InputPlan], columns: dict[str, int]) -> None:
    """Raise ValueError where a scheme cannot hold for linears with so many input columns, before any work."""
    for plan in plans:
        if not plan.is_quantized:
            continue
        normal, _ = plan.linear.split(columns[plan.group.linears[0]])
        if plan.linear.rotation is not None and plan.linear.rotation.kind == "hadamard":
            hadamard(normal)


def linear_of(layer: DecoderLayer, name: str) -> nn.Linear:
    """The linear of a full-precision layer by its name in it."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def unrotate_input(x: Tensor, linear: LinearScheme) -> Tensor:
    """x [T, K] as a full-precision linear takes it: the rotation of the normal columns undone."""
    if linear.rotation is None:
        return x
    normal, _ = linear.split(x.shape[1])
    out = x.clone()
    out[:, :normal] = unrotate(x[:, :normal], linear.rotation)
    return out
