"""What quality.py measures: its options, and the checkpoints that they ask for in their order."""

from dataclasses import dataclass, replace
from typing import Literal

from accuracy_run import MeasureOptions

from atom.calibration.config import Clip
from atom.calibration.distill_plan import DEFAULT_STEPS
from atom.calibration.ladder import ladder, scaled_outliers
from atom.eval.perplexity import Bos
from atom.models.family import model_config
from atom.models.source import read_config
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import Scheme
from atom.records import LADDER_STEPS

Rounding = tuple[Scheme, bool, Clip]


@dataclass(frozen=True)
class Measure(MeasureOptions):
    """Measure one model."""

    text: tuple[str, ...] = ("wikitext2",)
    """Test texts; the first is for every configuration, the others for some rungs of the ladder."""

    other_texts: tuple[str, ...] = ("fp", "kv4", "distill")
    """These rungs."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks for the presets."""

    bos: Bos = "auto"
    """As for atom eval."""

    what: tuple[Literal["ladder", "variants", "presets", "kv-rope", "scaled"], ...] = (
        "ladder",
        "presets",
        "kv-rope",
        "scaled",
    )
    """What to measure; variants are the full recipe with one choice made otherwise, scaled is it with the outlier count
    that is 128's share of 4096 channels."""

    kernels: bool = False
    """Measure the presets that have GPU kernels in bfloat16 as well, through these and without: rows of their own."""

    kernel_schemes: tuple[str, ...] = ()
    """Only these presets through the kernels."""

    schemes: tuple[str, ...] = ()
    """Presets to measure, in this order: all, or the ones that time allows."""

    distilled: tuple[str, ...] = ("w4a4",)
    """Presets to distil besides: rows of their own."""

    distill_steps: int = DEFAULT_STEPS
    """Steps of distillation, of the ladder's last step and of presets."""

    distill_tokens: int = 4096
    """Tokens of a step of distillation."""

    steps: tuple[str, ...] = LADDER_STEPS
    """Steps of the ladder to measure, in this order: all, or the ones that time allows."""

    variants: tuple[str, ...] = ()
    """Variants to measure, by name: all, or these."""


@dataclass(frozen=True)
class Configuration:
    """One checkpoint to make and measure, and the records that its numbers belong to.

    step       rung of the ladder, or None
    is_preset  a row of quality-presets, with tasks and, where asked for, through the kernels
    variant    what is otherwise than in the full recipe: a row of quality-variants
    distilled  trained after rounding
    """

    scheme: Scheme
    gptq: bool
    clip: Clip = "measured"
    step: str | None = None
    is_preset: bool = False
    variant: str | None = None
    distilled: bool = False

    @property
    def rounding(self) -> Rounding:
        """What decides the checkpoint before it is distilled."""
        return self.scheme, self.gptq, self.clip


def variants() -> list[Configuration]:
    """The full recipe with one choice made otherwise, the weights' grids first."""
    recipe = PRESETS["w4a4"]
    assert recipe.weight is not None and recipe.activation is not None
    whole = replace(recipe.weight, clip=1.0, scale_rule="max")
    unclipped = replace(recipe, weight=whole)
    schemes = {
        "weights unclipped": unclipped,
        "weights unclipped, 16-bit cache": replace(unclipped, kv=None, kv_offset="bias", kv_rotation="none"),
        "weights searched below the maximum": replace(recipe, weight=replace(recipe.weight, scale_rule="max")),
        "weights unclipped, bf16 scales": replace(recipe, weight=replace(whole, scale_format="bf16", outer=None)),
        "bf16 scales": replace(recipe, weight=replace(recipe.weight, scale_format="bf16", outer=None)),
    }
    found = [Configuration(scheme, True, variant=name) for name, scheme in schemes.items()]
    plain = replace(unclipped, activation=replace(recipe.activation, clip=1.0))
    found.append(Configuration(plain, True, "constant", variant="nothing clipped"))
    found.append(Configuration(unclipped, False, variant="weights unclipped, rounded to nearest"))
    return found


def configurations(options: Measure) -> list[Configuration]:
    """What `options` ask for, the ladder first; a rung that is a preset is made once for both."""
    found = []
    has_presets = "presets" in options.what
    if "ladder" in options.what:
        steps = {step.name: step for step in ladder(128)}
        for step in (steps[name] for name in options.steps):
            is_preset = has_presets and step.name in ("fp", "kv4", "distill")
            found.append(
                Configuration(step.scheme, step.gptq, step.clip, step.name, is_preset, distilled=step.distilled)
            )
    if "variants" in options.what:
        found += [v for v in variants() if not options.variants or v.variant in options.variants]
    if has_presets:
        known = {(c.scheme, c.distilled) for c in found if c.is_preset}
        found += [c for c in _presets(options) if (c.scheme, c.distilled) not in known]
    if "scaled" in options.what:
        raw, generation = read_config(options.model)
        count = scaled_outliers(model_config(raw, generation).hidden_size)
        step = next(step for step in ladder(count) if step.name == "kv4")
        found.append(Configuration(step.scheme, step.gptq, step.clip, step.name))
    return found


def _presets(options: Measure) -> list[Configuration]:
    """The presets that `options` ask for, full precision first, since the others lose against it."""
    schemes = [PRESETS["bf16"], *(s for s in PRESETS.values() if s.is_quantized)]
    schemes += [get_scheme(f"bf16+{kv}") for kv in ("kv4", "kv8", "kvfp8")]
    if options.schemes:
        schemes = [get_scheme(name) for name in options.schemes]
    found = []
    for scheme in schemes:
        plain = Configuration(scheme, scheme.weight is not None and scheme.name not in ("w8a8", "fp8"), is_preset=True)
        found.append(plain)
        if scheme.weight is not None and scheme.name in options.distilled:
            found.append(replace(plain, distilled=True))
    return found
