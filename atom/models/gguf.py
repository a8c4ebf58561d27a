"""GGUF files: their header, checked before anything else is done, and the one-time conversion to a plain directory.

The weights are read by transformers' GGUF reader, which knows llama.cpp's names and its row order of q and k; what
comes out is an fp16 safetensors directory like any other. It lies in the cache under the file's hash and appears
there by a rename, so a killed conversion leaves nothing that looks finished.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import struct
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .family import family_of
from .gguf_reader import one_reading
from .tokens import leading_bos

log = logging.getLogger(__name__)

PROVENANCE_FILE = "atom_source.json"
_CONVERTER = 2  # part of the cache key: raise it when a conversion would come out differently
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # metadata value type -> bytes
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says it holds.

    architecture  llama.cpp's name of the model family
    types         ggml type (Q4_K, F32, ...) -> number of tensors stored so
    adds_bos      whether texts begin with BOS, where the file says so
    """

    architecture: str
    types: dict[str, int]
    adds_bos: bool | None = None


def read_header(path: Path) -> GgufHeader:
    """Parse and check the header of a GGUF file.

    Raises CheckpointError if the file is not GGUF, is damaged or shorter than its tensors, and UnsupportedError for
    a version or a tensor type that cannot be read.
    """
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too few for a GGUF file; download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        if blob[:4] != b"GGUF":
            raise CheckpointError(
                f"{path} begins with {bytes(blob[:4])!r}; a GGUF file begins with b'GGUF'; "
                "pass a GGUF file or a model directory."
            )
        try:
            return _parse(path, blob)
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(
                f"the header of {path} ends early or is damaged ({error}); it must be whole; download the file again."
            ) from error


def _parse(path: Path, blob: mmap.mmap) -> GgufHeader:
    version, tensor_count, value_count = struct.unpack_from("<IQQ", blob, 4)
    if version not in (2, 3):
        raise UnsupportedError(
            f"{path} is GGUF version {version}; versions 2 and 3 can be read; convert it with a current llama.cpp."
        )
    cursor = 24
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key, cursor = _string(blob, cursor)
        (kind,) = struct.unpack_from("<I", blob, cursor)
        metadata[key], cursor = _value(blob, cursor + 4, kind)
    ends, types = [0], Counter[str]()
    for _ in range(tensor_count):
        name, cursor = _string(blob, cursor)
        (dims,) = struct.unpack_from("<I", blob, cursor)
        shape = struct.unpack_from(f"<{dims}Q", blob, cursor + 4)
        kind, offset = struct.unpack_from("<IQ", blob, cursor + 4 + 8 * dims)
        cursor += 16 + 8 * dims
        type_name, size = _tensor_type(path, name, kind, math.prod(shape))
        types[type_name] += 1
        ends.append(offset + size)
    alignment = int(metadata.get("general.alignment", 32))
    needed = math.ceil(cursor / alignment) * alignment + max(ends)
    if needed > len(blob):
        raise CheckpointError(
            f"{path} has {len(blob)} bytes, its tensors need {needed}; the file is truncated; download it again."
        )
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    return GgufHeader(str(metadata.get("general.architecture")), dict(types), adds_bos)


def _string(blob: mmap.mmap, cursor: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", blob, cursor)
    cursor += 8
    if cursor + length > len(blob):
        raise struct.error(f"a string of {length} bytes at byte {cursor} of {len(blob)}")
    return blob[cursor : cursor + length].decode("utf-8"), cursor + length


def _value(blob: mmap.mmap, cursor: int, kind: int) -> tuple[Any, int]:
    """One metadata value (strings, integers, booleans; None for what no one asks for), and the cursor behind it."""
    if kind == _STRING:
        return _string(blob, cursor)
    if kind == _ARRAY:
        element, count = struct.unpack_from("<IQ", blob, cursor)
        cursor += 12
        if element in _FIXED:
            return None, cursor + count * _FIXED[element]
        for _ in range(count):
            _, cursor = _value(blob, cursor, element)
        return None, cursor
    if kind not in _FIXED:
        raise struct.error(f"metadata value type {kind} at byte {cursor}")
    if kind == _BOOL:
        return bool(blob[cursor]), cursor + 1
    value = struct.unpack_from("<I", blob, cursor)[0] if kind == 4 else None
    return value, cursor + _FIXED[kind]


def _tensor_type(path: Path, name: str, kind: int, values: int) -> tuple[str, int]:
    """(ggml type name, bytes) of a tensor of `values` elements."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {
        int(key): (key.name, *size) for key, size in GGML_QUANT_SIZES.items() if isinstance(key, GGMLQuantizationType)
    }
    if kind not in known:
        raise UnsupportedError(
            f"{path}: tensor {name} has ggml type {kind}, which cannot be read; known types: "
            f"{', '.join(entry[0] for entry in known.values())}; use a file in one of these."
        )
    type_name, block, block_bytes = known[kind]
    return type_name, values // block * block_bytes


def convert(path: Path, cache: Path) -> Path:
    """The directory with the fp16 weights, config and tokenizer of the GGUF file `path`, made if need be.

    It is `cache`/gguf/<hash of the file>. Raises what read_header raises, UnsupportedError if transformers cannot
    read the file or Atom does not run its architecture, and CheckpointError if the cache cannot be written.
    """
    from safetensors import SafetensorError

    header = read_header(path)
    digest = file_sha256(path)
    target = cache / "gguf" / f"{digest[:32]}-{_CONVERTER}"
    if target.exists():
        return target
    log.info("converting %s (once; kept in %s)", path.name, target)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    provenance = {"source": path.name, "source_sha256": digest, "source_types": header.types}
    try:
        partial.mkdir(parents=True)
        with one_reading():
            _write(path, header, partial)
        (partial / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        if not target.exists():  # else another process was faster
            raise CheckpointError(
                f"{path.name} could not be converted into {cache}: {error}; the directory must be writable and "
                "have room for the model in fp16; free some space, or set ATOM_CACHE to another directory."
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write(path: Path, header: GgufHeader, out: Path) -> None:
    """Read `path` with transformers and save it as a plain fp16 model directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": torch.float16}
    try:  # newer transformers keep the blocks packed unless told otherwise
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        family_of({"architectures": config.architectures or [_causal_name(config)]})  # refuse before the long part
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        refuse_unigram(path, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:
        raise UnsupportedError(
            f"transformers cannot read {path} ({type(error).__name__}: {error}); the file must be a language model in "
            "a type it knows; use another quantization of the model, or its safetensors."
        ) from error
    if getattr(model.config, "quantization_config", None) is not None:  # or the directory would claim to hold GGUF
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    if header.adds_bos:
        begin_with_bos_(tokenizer)
    tokenizer.save_pretrained(out)


def refuse_unigram(path: Path, tokenizer: Any) -> None:
    """UnsupportedError if text would be split otherwise than the model learned it.

    Seen: transformers 5.17 makes a unigram model of Gemma's vocabulary, whose pieces are merged by rank, as 5.23 does.
    """
    if type(tokenizer.backend_tokenizer.model).__name__ == "Unigram":
        raise UnsupportedError(
            f"transformers {version('transformers')} misreads the tokenizer of {path}: it chooses pieces by score "
            "where the model merges them by rank; install transformers 5.23 or newer, or use the model's safetensors."
        )


def begin_with_bos_(tokenizer: Any) -> None:
    """Make a fast tokenizer begin every text with BOS, as the file says; some transformers forget it (seen: 5.17).

    Raises UnsupportedError where transformers found no BOS in the file.
    """
    if leading_bos(tokenizer) is not None:
        return
    if tokenizer.bos_token is None:
        raise UnsupportedError(
            f"the file says that texts begin with BOS, of which transformers {version('transformers')} finds none; "
            "install transformers 5.23 or newer, or use the model's safetensors."
        )
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _causal_name(config: Any) -> str:
    """The causal language model's class that transformers would load for `config`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
