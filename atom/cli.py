"""The command `atom`: finds the sub-command, parses its options, prints for people, ends with JSON for programs.

Every sub-command is a module of atom.commands with a dataclass `Options`, whose fields and their docstrings are the
options and their help, and a function `run(options) -> dict` that prints what a person wants to read and returns what
a program does. Exit code 0 is success, 1 a failure, 2 wrong usage.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import getdoc
from typing import Any, get_args

from .errors import AtomError

COMMANDS = {
    "quantize": "make a low-bit checkpoint from a model",
    "check": "what would run, how large, how long; before a weight is read",
    "eval": "perplexity and lm-eval tasks of a checkpoint or a model",
    "serve": "serve a model over HTTP, as the OpenAI API",
    "chat": "talk to a model in the terminal, or answer one --prompt",
    "bench": "load a server, run the engine offline, sweep schemes, print bounds",
    "report": "draw a quantization report, or compare evaluation results",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atom ARGV...` and return its exit code."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has read enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return 1
    return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from . import __version__

        print(f"atom {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"atom: unknown command {name!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    as_json = "--json" in rest
    rest = [a for a in rest if a != "--json"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return _run(name, rest, as_json)


def _run(name: str, arguments: list[str], as_json: bool) -> int:
    import tyro

    command: Any = import_module(f"{__package__}.commands.{name}")
    parsed, program, about = command.Options, f"atom {name}", command.__doc__
    part = _part(command.Options, arguments[0]) if arguments else None
    if part is not None:
        parsed, program, about = part, f"{program} {arguments[0]}", getdoc(part)
        arguments = arguments[1:]
    try:
        options: Any = tyro.cli(
            parsed,
            prog=program,
            description=f"{about}\n\n--json ends the output with one line of JSON.",
            args=arguments,
        )
    except (AtomError, ValueError) as error:  # an option's value was refused by its dataclass
        print(f"atom {name}: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        result = command.run(options)
    except BrokenPipeError:
        raise
    except FileNotFoundError as error:
        missing = f"{error.filename} does not exist; check the path" if error.filename else str(error)
        print(f"atom {name}: {missing}", file=sys.stderr)
        return 1
    except (AtomError, ValueError, OSError) as error:
        print(f"atom {name}: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0].partition(".")[0]
        print(f"atom {name}: {_OUT_OF_MEMORY.format(error=first or 'host')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"atom {name}: interrupted", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(result, default=str), flush=True)
    return 0


def _part(options: Any, word: str) -> Any:
    """The options of a command's part (`atom bench WORD`), or None: parsed alone, messages name it in full."""
    parts = {config.name: part.__origin__ for part in get_args(options) for config in part.__metadata__}
    return parts.get(word)


_OUT_OF_MEMORY = (
    "out of memory ({error}); `atom check` says what a model needs: take smaller batches (--batch-size, "
    "--batch-tokens), --offload on for atom quantize, a scheme of fewer bits, or another device"
)


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's memory, or the host's. Neither the host's nor what CUDA itself lacks has a type of its own in torch."""
    import torch

    texts = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _overview() -> str:
    lines = [f"  atom {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: atom COMMAND ...        atom COMMAND --help has options and a working example",
            "",
            *lines,
            "",
            "example: atom quantize smollm2 --scheme w4a4 --calib text.txt --output smollm2-w4a4",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
