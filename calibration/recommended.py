"""The scheme that measurements recommend for a GPU: what `atom quantize --scheme auto` means.

On Hopper products of INT4 codes run on the INT8 tensor cores, so that 4-bit activations are no faster than 8-bit ones
and only lose accuracy: `w4a8` serves the most tokens of all schemes (record `throughput`; w8a8 and fp8 read twice the
weights). Its form in groups of 32 behind Hadamard blocks takes 3 to 7 % longer for a decode step (Llama-3-8B, H200),
the same for prompts, and loses 0.8 to 2.5 % of perplexity on the three real models above 0.4 B, where Atom's own format
with 8-bit activations loses 6 to 13 % (record `accuracy-frontier`: `ours`, `atom`). All that on an H200; an H100 has
the same SMs and less bandwidth, which favours few bytes the more.
"""

import torch

from atom.errors import UnsupportedError

AUTO = "auto"
RECOMMENDED = {"h200": "w4a8-hadamard", "h100": "w4a8-hadamard"}


def resolve(scheme: str, gpu: str | None) -> str:
    """The scheme's name, with the preset for `gpu` where it is auto; a cache behind a plus stays."""
    name, plus, kv = scheme.partition("+")
    return f"{recommended_scheme(gpu)}{plus}{kv}" if name == AUTO else scheme


def recommended_scheme(gpu: str | None) -> str:
    """The preset for `gpu` (h100, h200), or for this machine's GPU where it is None.

    Raises UnsupportedError where nothing was measured on it, or there is none.
    """
    name = gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    for known, scheme in RECOMMENDED.items():
        if known in name.lower():
            return scheme
    raise UnsupportedError(
        f"nothing was measured that would recommend a scheme for {name}; give --gpu {' or '.join(RECOMMENDED)} "
        "for the one that will serve the model, or name a scheme"
    )
