"""The scheme that measurements recommend for a GPU: what `atom quantize --scheme auto` means.

On Hopper products of INT4 codes run on the INT8 tensor cores, so that 4-bit activations are no faster than 8-bit ones
and only lose accuracy: of the schemes with 4-bit weights and cache, the one with 8-bit activations serves the most
tokens (record `throughput`) and loses least (record `accuracy-frontier`); w8a8 and fp8 read twice the weights.
"""

import torch

from atom.errors import UnsupportedError

AUTO = "auto"
RECOMMENDED = {"h200": "w4a8-hadamard", "h100": "w4a8-hadamard"}


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
