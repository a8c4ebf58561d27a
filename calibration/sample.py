"""Calibration text that the model writes itself, for machines that reach no dataset.

Every window starts from the BOS token (or a token drawn at random where the tokenizer has none) and goes on by
sampling from the full-precision model at temperature 1. The whole model is in memory while it writes.
Source: data-free quantization as in LLM-QAT, arXiv:2305.17888.
"""

import torch

from atom.models.kv import DenseKV
from atom.models.loader import load_source
from atom.models.source import Source, load_tokenizer
from atom.models.tokens import leading_bos

from .config import CalibrationConfig
from .data import SELF, Windows

MAX_WINDOWS_AT_ONCE = 32


def sample_windows(source: Source, config: CalibrationConfig, device: torch.device) -> Windows:
    """`num_windows` windows [window_length] that the model samples from the seed."""
    model = load_source(source, device, torch.float32, "reference")
    bos = leading_bos(load_tokenizer(source.path))
    generator = torch.Generator(device).manual_seed(config.seed)
    parts = []
    with torch.no_grad():
        for start in range(0, config.windows, MAX_WINDOWS_AT_ONCE):
            count = min(MAX_WINDOWS_AT_ONCE, config.windows - start)
            kv = DenseKV(model.config, count, device=device, max_len=config.window_length)
            if bos is not None:
                token = torch.full((count,), bos, device=device)
            else:
                token = torch.randint(model.config.vocab_size, (count,), generator=generator, device=device)
            tokens = [token]
            while len(tokens) < config.window_length:
                scores = model.logits(model(token, kv.positions(1), kv))
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
                tokens.append(token)
            parts.append(torch.stack(tokens, 1).cpu())
    return Windows.of(torch.cat(parts), SELF)
