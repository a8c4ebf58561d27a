"""The compiled attention kernels of a config: from memory, from disk, or compiled now."""

from collections.abc import Callable
from typing import Any

from .attention_config import AppendConfig, DecodeConfig
from .cache import kernel_key, kernel_path, load_kernel
from .recent_config import RecentConfig

ARCH = "sm_90a"


def decode_kernel(config: DecodeConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .paged_decode_sm90 import compile_decode

        return compile_decode(config)

    return _load("paged_decode_sm90", config, compile)


def prefix_kernel(config: DecodeConfig) -> Any:
    """The same for a prefix that sequences share."""

    def compile() -> Any:
        from .prefix_decode_sm90 import compile_prefix

        return compile_prefix(config)

    return _load("prefix_decode_sm90", config, compile)


def recent_kernel(config: RecentConfig) -> Any:
    """The same for the newest tokens, which are exact."""

    def compile() -> Any:
        from .recent_decode_sm90 import compile_recent

        return compile_recent(config)

    return _load("recent_decode_sm90", config, compile)


def has_prefix_kernel(config: DecodeConfig) -> bool:
    """It has been compiled."""
    name = "prefix_decode_sm90"
    return kernel_path(name, kernel_key(name, config, ARCH)).exists()


def append_kernel(config: AppendConfig) -> Any:
    def compile() -> Any:
        from .rope_append_sm90 import compile_append

        return compile_append(config)

    return _load("rope_append_sm90", config, compile)


def _load(name: str, config: object, compile: Callable[[], Any]) -> Any:
    return load_kernel(name, config, compile, ARCH)
