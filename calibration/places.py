"""Where formats are chosen, each input and each cache of every layer; what may run there, and its cost in bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from atom.models.family import InputGroup
from atom.models.model import Model
from atom.quant.presets import KV_SUFFIXES, get_scheme
from atom.quant.schemes import LinearScheme, OutlierSpec, Scheme, TensorSpec

OUTLIERS = (0, 64, 128, 256)
CACHES = ("kv4", "kv8")
CONTEXT = 2048  # tokens whose keys and values a token reads

Losses = dict[str, dict[str, float]]  # place ("3.mlp_input", "3.cache") -> choice -> nats a token
Choices = Mapping[str, Mapping[str, LinearScheme | TensorSpec]]  # place -> choice -> what runs


def default_choices(columns: int) -> dict[str, LinearScheme]:
    """What a place may run, by name: all have kernels. Outlier counts beyond half of `columns` are left out."""
    w4a4, w4a8, w8a8, w3a3 = (get_scheme(name).default_linear for name in ("w4a4", "w4a8", "w8a8", "w3a3"))
    found = {"w3a3": w3a3} if columns > 2 * w3a3.outliers.count else {}
    for count in OUTLIERS:
        if 2 * count < columns:
            found[f"w4a4, {count} outliers"] = replace(w4a4, outliers=OutlierSpec(count))
    by_blocks = {name: get_scheme(name).default_linear for name in ("w4a4-hadamard", "w4a8-hadamard")}
    return {**found, **by_blocks, "w4a8": w4a8, "w8a8": w8a8}


@dataclass(frozen=True)
class Place:
    """One input of one layer, or its cache, and what is known of its choices.

    group    None for the cache
    macs     multiplications a token, in all linears that read it; of a cache, keys and values that a token reads
    bits     mean bits of an operand under each choice
    by_kind  the same of weight and activation apart; of a cache, kv
    columns input channels of the linears
    """

    layer: int
    group: InputGroup | None
    macs: int
    bits: dict[str, float]
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.layer}.{'cache' if self.group is None else self.group.name}"


def find_places(model: Model, base: Scheme, context: int = CONTEXT) -> tuple[list[Place], Choices]:
    """All places of a model (which may be on the meta device), and the choices of each by its name.

    base     whose cache, where it has one of few bits, is chosen layer by layer; where its weights are in full
             precision, nothing but the cache
    context  tokens whose keys and values a token reads; 0 leaves the cache as it is
    Raises ValueError where that leaves nothing to choose.
    """
    places: list[Place] = []
    choices: dict[str, Mapping[str, LinearScheme | TensorSpec]] = {}
    config = model.config
    cached = 2 * config.num_kv_heads * config.head_dim
    caches = {name: spec for name in CACHES if (spec := KV_SUFFIXES[name]) is not None}
    for index, layer in enumerate(model.model.decoder_layers()):
        for group in model.family.groups if base.weight is not None else ():
            shapes = [layer.get_parameter(f"{name}.weight").shape for name in group.linears]
            K = shapes[0][1]
            known = default_choices(K)
            by_kind = {
                name: {"weight": choice.weight_bits(K), "activation": choice.activation_bits(K)}
                for name, choice in known.items()
            }
            bits = {name: (found["weight"] + found["activation"]) / 2 for name, found in by_kind.items()}
            place = Place(index, group, sum(n * k for n, k in shapes), bits, by_kind)
            places.append(place)
            choices[place.name] = known
        if base.kv is not None and context:
            seen = min(context, config.windows[index] or context)
            exact = 16 * min(base.kv_recent, seen) / seen  # the newest tokens are kept as they were, beside
            bits = {name: spec.bits_per_value(config.head_dim) + exact for name, spec in caches.items()}
            places.append(Place(index, None, cached * seen, bits, {name: {"kv": b} for name, b in bits.items()}))
            choices[places[-1].name] = caches
    if not places:
        raise ValueError(
            f"{base.name} leaves nothing to choose: weights are in full precision, and so is the cache, or it does not "
            "count; use +kv4 and a budget_context above 0, or a scheme that rounds weights"
        )
    return places, choices
