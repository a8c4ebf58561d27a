"""How long a calibration will take and how much memory it needs, before a weight is read.

Operations are counted from shapes; the rate is measured on the spot with a small product of the same kind, or taken
from a table for a GPU that is not at hand. Good to a factor of 1.5 on the models it was compared with
(docs/calibration.md); what it leaves out is reading and writing files.
"""

import time
from dataclasses import dataclass

import torch

from atom.models.model import Model
from atom.quant.rounding import MSE_RATIOS
from atom.quant.schemes import Scheme

from .clips import CANDIDATES, measured_groups, probe_tokens
from .config import CalibrationConfig
from .distill_plan import distill_bytes

PASSES = 3  # energies, Hessians, propagation
PROCESS_BYTES = 450 * 2**20  # the interpreter with torch and transformers, before any tensor


@dataclass(frozen=True)
class Machine:
    """What bounds a calibration: float32 product rate, element-wise bandwidth, the cost of a tiny op, and of a GPU its
    memory."""

    name: str
    flops: float
    bytes_per_s: float
    op_s: float
    memory_bytes: int | None = None

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


# Measured on the device by the product below with TF32 allowed; see docs/calibration.md.
GPUS = {
    "h200": Machine("h200", 330e12, 3.0e12, 8e-6, 139 * 2**30),
    "h100": Machine("h100", 330e12, 2.2e12, 8e-6, 79 * 2**30),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds, and the largest memory: of the process on a CPU, of the device's tensors on a GPU."""

    seconds: float
    peak_bytes: int


def measure_machine(device: torch.device | str = "cpu") -> Machine:
    """Time one product and one element-wise pass on `device` (about half a second)."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    product = _seconds(lambda: a @ a, device)
    wide = torch.randn(4 * size, size, device=device)
    passed = _seconds(lambda: (wide * 1.5).round_().clamp_(-8, 7), device)
    small = torch.randn(256, device=device)
    tiny = _seconds(lambda: small.mul_(1.0), device, repeats=200)
    return Machine(str(device), 2 * size**3 / product, 6 * wide.numel() * 4 / passed, tiny)


def estimate(model: Model, scheme: Scheme, config: CalibrationConfig, machine: Machine) -> Estimate:
    """Time and peak memory of calibrating `model` (on the meta device) under `scheme`."""
    tokens = config.windows * config.window_length
    groups = measured_groups(model, scheme) if config.clip == "measured" else ()
    probed = probe_tokens(config.windows, config.window_length) if groups else 0
    seconds = 0.0
    largest_layer = largest_hessians = widest = 0
    for layer in model.model.decoder_layers():
        weights = sum(p.numel() for p in layer.parameters())
        inputs = {
            group.name: [tuple(layer.get_parameter(f"{name}.weight").shape) for name in group.linears]
            for group in model.family.groups
        }
        attention = 4 * tokens * config.window_length * model.config.num_heads * model.config.head_dim
        flops = PASSES * (2 * weights * tokens + attention) + (1 + len(CANDIDATES)) * 2 * weights * probed
        moved = columns = hessians = 0
        for shapes in inputs.values():
            N, K = sum(shape[0] for shape in shapes), shapes[0][1]
            # Reading, rounding and writing activations: a dozen float32 passes where they are rounded, a few elsewhere.
            moved += 4 * tokens * (K * (12 * (PASSES - 1) + 4 * PASSES) + N * 3 * PASSES)
            moved += 4 * len(CANDIDATES) * probed * K * 12
            if scheme.weight is not None and scheme.weight.clip == "mse":
                moved += 4 * N * K * 13 * len(MSE_RATIOS)
            if config.gptq:
                flops += 2 * K * K * tokens + K**3 * 2 + 2 * N * K * K
                moved += 4 * N * K * 10
                columns += K
                hessians += 4 * K * K
            widest = max(widest, K, N)
        seconds += flops / machine.flops + moved / machine.bytes_per_s + columns * 12 * machine.op_s
        largest_layer = max(largest_layer, 4 * weights)
        largest_hessians = max(largest_hessians, hessians)
    hidden = 4 * tokens * model.config.hidden_size
    batch = config.windows_per_batch * config.window_length
    activations = 4 * batch * widest * 6
    keeps_hidden = config.offload != "on"
    peak = 3 * largest_layer + 2 * largest_hessians + activations + hidden * keeps_hidden
    return Estimate(seconds, peak + (PROCESS_BYTES if machine.is_cpu else 0))


def estimate_distillation(model: Model, scheme: Scheme, config: CalibrationConfig, machine: Machine) -> Estimate:
    """Time and peak memory of the configured steps of distillation; in a recorded step kernels follow one another."""
    sizes, tokens = model.config, max(config.distill_tokens, config.window_length)
    weights = sum(p.numel() for layer in model.model.decoder_layers() for p in layer.parameters())
    attention = 2 * tokens * config.window_length * sizes.num_heads * sizes.head_dim * sizes.num_layers  # causal
    logits = 2 * tokens * sizes.vocab_size * sizes.hidden_size
    # The full model; the rounded one, twice where activations are not kept; its gradients, twice a forward pass.
    flops = 5 * 2 * weights * tokens + 5 * attention + 3 * logits
    widths = sizes.num_layers * (8 * sizes.hidden_size + 3 * sizes.intermediate_size)
    passes = WEIGHT_PASSES * weights + tokens * (ACTIVATION_PASSES * widths + LOGIT_PASSES * sizes.vocab_size)
    kernels = sizes.num_layers * KERNELS_PER_LAYER * RECORDED_KERNEL_S
    a_step = flops / machine.flops + 4 * passes / machine.bytes_per_s + kernels
    steps = config.distill_steps or 0
    return Estimate(min(steps * a_step, config.distill_seconds), distill_bytes(model, scheme, config))


WEIGHT_PASSES, ACTIVATION_PASSES, LOGIT_PASSES = 16, 12, 12  # float32 reads and writes of a step
KERNELS_PER_LAYER, RECORDED_KERNEL_S = 800, 2e-6


def _seconds(work: object, device: torch.device, repeats: int = 5) -> float:
    """The best of `repeats` timings of `work`, in seconds."""
    assert callable(work)
    best = float("inf")
    for _ in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
