"""A program of its own: says whether grammars compile, so that one which crashes or stalls the compiler harms nobody.

    python -s -P guidance_check.py      lines of {"grammar", "limits"} in; lines of {"error"} out, null if all is well

The compiler is recursive, and a few kilobytes of a hostile grammar can exhaust its stack or keep it busy for minutes.
No thread can be stopped in there; a process can be killed. What compiles is also tried on a random text, byte by
byte. This file imports nothing of Atom.
"""

import json
import random
import sys
import threading
import time
from typing import Any

STACK_BYTES = 2**24
MEMORY_BYTES = 2**31
WALK = 64  # bytes of the random text
BYTE_S = 0.2  # what may come next is found within it; over a real vocabulary it takes longer


def problem_of(grammar: str, limits: dict[str, Any]) -> str:
    """Why a grammar cannot be used; empty if it can."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
    choose = random.Random(0).choice
    for _ in range(WALK):
        if matcher.is_error():
            return str(matcher.get_error())
        if matcher.is_stopped():
            break
        start = time.monotonic()
        allowed = [t for t, weight in enumerate(matcher.compute_logit_bias()) if weight and t != tokenizer.eos_token]
        if time.monotonic() - start > BYTE_S:
            return f"it takes {time.monotonic() - start:.1f} s to see what may follow, so it is too ambiguous"
        if not allowed:
            break
        matcher.consume_token(choose(allowed))
    return str(matcher.get_error()) if matcher.is_error() else ""


def serve() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            error = problem_of(asked["grammar"], asked["limits"])
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        sys.stdout.write(json.dumps({"error": error[:2000] or None}) + "\n")
        sys.stdout.flush()


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):  # a bound the system cannot set; the caller's time limit still holds
        pass
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
