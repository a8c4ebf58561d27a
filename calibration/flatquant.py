"""Learned affine transforms and clips by block-wise distillation, to compare with: FlatQuant's idea in small.

The input x [T, K] of a group of linears becomes x' = L^T (x / c) R, K folded to a matrix of n1 rows and n2 columns; its
weights W become L^-1 (W c) R^-T, rows folded alike, so that x' W'^T = x W^T exactly while nothing is rounded. L, R, c,
the share of its largest magnitude that each rounded token (one share for an input) and each weight row reaches are
learned, decoder layer by decoder layer, to bring the rounded layer's output close to the full layer's on the full
model's hidden states (mean squared error). One scale a token and a weight row, weights rounded to nearest.

L, R and c run online, which no kernel here does: the result is a model in memory, not a checkpoint.
Source: FlatQuant, arXiv:2410.09426, with shorter training; o's transform is one Kronecker product over heads and head.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, isqrt, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from atom.models.kv import DenseKV
from atom.models.layers import DecoderLayer
from atom.models.model import Model
from atom.quant.schemes import Scheme

from .recorded import RecordedStep
from .trainable import TrainingKV, straight_through

REACH = 4.0  # logit of the share that a grid reaches at first: 0.98
WHOLE = 20.0  # of all of it
NEWTON_STEPS = 3  # from a matrix that one step of the optimizer lies behind: 0.3 away becomes 0.3 to the 16th
CHECKED_STEPS = 8  # are enqueued on a GPU before the clock is read

Learned = Literal["transforms", "factors", "clips"]
ALL: tuple[Learned, ...] = ("transforms", "factors", "clips")


@dataclass(frozen=True)
class FlatConfig:
    """How the transforms are learned, and to how many bits tokens and weight rows are rounded.

    learns   of the transforms (L and R), the factors c, and the clips: what is not learned is left out
    batch    windows of a step
    seconds  at most so long for the whole model, in equal shares for its layers: fewer steps then, whose rates fall
             to their end all the same
    """

    learns: tuple[Learned, ...] = ALL

    weight_bits: int = 4
    activation_bits: int = 4
    steps: int = 60
    batch: int = 4
    seconds: float = float("inf")
    rate: float = 5e-3
    clip_rate: float = 5e-2
    seed: int = 0


class FlatInput(nn.Module):
    """What happens to the input of a group of linears, [T, K] -> [T, K]."""

    def __init__(
        self, K: int, bits: int, generator: torch.Generator, device: torch.device, learns: Sequence[Learned] = ALL
    ) -> None:
        super().__init__()
        self.rows = next(n for n in range(isqrt(K), 0, -1) if K % n == 0)
        self.bits = bits
        sides = [
            _orthogonal(n, generator) if "transforms" in learns else torch.eye(n) for n in (self.rows, K // self.rows)
        ]
        self.left, self.right = (nn.Parameter(side.to(device)) for side in sides)
        self.left_inverse, self.right_inverse = (side.T.to(device, copy=True) for side in sides)
        self.log_scale = nn.Parameter(torch.zeros(K, device=device))
        self.reach = nn.Parameter(torch.full((1,), REACH if "clips" in learns else WHOLE, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return round_rows(self.transform(x), self.reach, self.bits)

    def transform(self, x: Tensor) -> Tensor:
        folded = (x * (-self.log_scale).exp()).unflatten(-1, (self.rows, -1))
        y: Tensor = (self.left.T @ folded @ self.right).flatten(-2)
        return y

    def solve(self) -> None:
        """Find both inverses anew, exactly."""
        for side, inverse in ((self.left, self.left_inverse), (self.right, self.right_inverse)):
            inverse.copy_(torch.linalg.inv(side.detach()))

    def transform_weight(self, W: Tensor) -> Tensor:
        """W [N, K] for inputs that `transform` has changed."""
        folded = (W * self.log_scale.exp()).unflatten(-1, (self.rows, -1))
        left, right = inverse_nearby(self.left, self.left_inverse), inverse_nearby(self.right, self.right_inverse)
        y: Tensor = (left @ folded @ right.T).flatten(-2)
        return y


class FlatLinear(nn.Module):
    """A linear behind a FlatInput, its weight transformed and rounded anew in every run."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, source: FlatInput, bits: int, learns: Sequence[Learned] = ALL) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.source = [source]  # in a list: its parameters are not this module's
        self.bits = bits
        reach = REACH if "clips" in learns else WHOLE
        self.reach = nn.Parameter(torch.full((linear.out_features, 1), reach, device=linear.weight.device))

    def rounded(self) -> Tensor:
        return round_rows(self.source[0].transform_weight(self.weight), self.reach, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.rounded(), self.bias)


def round_rows(x: Tensor, reach: Tensor, bits: int) -> Tensor:
    """x [..., K] on a symmetric grid whose end lies at sigmoid(reach) of each row's largest magnitude."""
    levels = (1 << (bits - 1)) - 1
    scale = torch.sigmoid(reach) * x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / levels
    inside = (x / scale).clamp(-levels - 1, levels)
    return straight_through(inside, inside.round()) * scale


def flatten_model(model: Model, tokens: Tensor, scheme: Scheme, config: FlatConfig) -> dict[str, Any]:
    """Learn transforms for every layer of `model` and round it, in place; each layer's first and last loss, and steps.

    model   in full precision and float32; afterwards it runs rounded, its cache as `scheme` says
    tokens  [windows, length] of calibration text
    """
    losses, steps = [], []
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        hidden = torch.stack([model.model.embed(row.to(model.device)) for row in tokens])
    layers = list(model.model.decoder_layers())
    share = config.seconds / len(layers)
    for layer in layers:
        with torch.no_grad():
            target = torch.cat([_run(layer, model, part, None) for part in hidden.split(4)])
        first, last, done = _learn(layer, model, hidden, target, scheme, replace(config, seconds=share), generator)
        losses.append((first, last))
        steps.append(done)
        hidden = target
    model.scheme = scheme
    return {"losses": losses, "steps": steps}


def _learn(
    layer: DecoderLayer,
    model: Model,
    hidden: Tensor,
    target: Tensor,
    scheme: Scheme,
    config: FlatConfig,
    generator: torch.Generator,
) -> tuple[float, float, int]:
    """Learn the transforms of one layer and round it, in place; the first and the last loss, and the steps made."""
    inputs: list[FlatInput] = []
    linears: dict[str, FlatLinear] = {}
    for group in model.family.groups:
        found = [(name, layer.get_submodule(name)) for name in group.linears]
        K = layer.get_parameter(f"{group.linears[0]}.weight").shape[1]
        source = FlatInput(K, config.activation_bits, generator, model.device, config.learns)
        inputs.append(source)
        layer.get_submodule(group.producer).register_forward_hook(lambda module, args, x, source=source: source(x))
        for name, linear in found:
            assert isinstance(linear, nn.Linear)
            linears[name] = FlatLinear(linear, source, config.weight_bits, config.learns)
            layer.set_submodule(name, linears[name])
    shapes = [p for source in inputs for p in (source.left, source.right) if "transforms" in config.learns]
    shapes += [source.log_scale for source in inputs if "factors" in config.learns]
    reaches = [module.reach for module in (*inputs, *linears.values()) if "clips" in config.learns]
    for parameter in (*shapes, *reaches):
        parameter.requires_grad_(True)
    learned = [(part, rate) for part, rate in ((shapes, config.rate), (reaches, config.clip_rate)) if part]
    on_gpu = model.device.type == "cuda"
    rates = [torch.tensor(rate, device=model.device) if on_gpu else rate for _, rate in learned]
    optimizer = torch.optim.AdamW(
        [{"params": part, "lr": rate} for (part, _), rate in zip(learned, rates, strict=True)],
        weight_decay=0.0,
        fused=on_gpu,
        capturable=on_gpu,
    )
    size = float(target.square().mean())

    def step(rows: Tensor) -> Tensor:
        loss = (_run(layer, model, hidden[rows], scheme) - target[rows]).square().mean() / size
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = RecordedStep(step, lambda: optimizer.zero_grad(set_to_none=True), model.device)
    first, loss = 0.0, torch.zeros(())
    done, started = 0, time.perf_counter()
    while done < config.steps and (late := (time.perf_counter() - started) / config.seconds) < 1:
        falling = (1 + cos(pi * max(done / config.steps, late))) / 2
        for parameters, (_, rate) in zip(optimizer.param_groups, learned, strict=True):
            if isinstance(parameters["lr"], Tensor):
                parameters["lr"].fill_(rate * falling)
            else:
                parameters["lr"] = rate * falling
        loss = run(torch.randint(0, len(hidden), (config.batch,), generator=generator))
        first = loss.item() if done == 0 else first
        done += 1
        if done % CHECKED_STEPS == 0:
            loss.item()
            for source in inputs:
                source.solve()
    last = loss.item()
    for parameter in (*shapes, *reaches):
        parameter.requires_grad_(False)
    for name, flat in linears.items():
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = nn.Parameter(flat.rounded(), requires_grad=False)
        if flat.bias is not None:
            plain.register_parameter("bias", nn.Parameter(flat.bias, requires_grad=False))
        layer.set_submodule(name, plain)
    return first, last, done


def _run(layer: DecoderLayer, model: Model, hidden: Tensor, scheme: Scheme | None) -> Tensor:
    """The layer's output for hidden [windows, length, hidden_size]."""
    count, length, _ = hidden.shape
    kv = DenseKV(model.config, count, device=model.device)
    if scheme is not None:
        kv = TrainingKV.for_scheme(model.config, scheme, count, model.device)
    out: Tensor = layer(hidden.flatten(0, 1), layer.rope(kv.positions(length)), kv)
    return out.view(hidden.shape)


def inverse_nearby(A: Tensor, near: Tensor) -> Tensor:
    """The inverse of a square matrix, with its gradient, from that of one nearby, which it replaces in `near`.

    Newton's iteration: products alone, which a recorded step may hold; solvers ask the GPU whether they succeeded.
    """
    with torch.no_grad():
        X = near
        for _ in range(NEWTON_STEPS):
            X = 2 * X - X @ A @ X
        near.copy_(X)
    return 2 * X - X @ A @ X  # its derivative by A is the inverse's


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    Q: Tensor
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return Q.mul_(R.diagonal().sign())
