"""The life of a server process: take the port, start up, serve, drain, and end with a code that says how it went.

The first SIGTERM or Ctrl-C drains and ends with 0, also during start-up; the second ends at once. If the engine dies,
its clients are told, and the process fails.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from atom.env import api_keys
from atom.errors import AtomError
from atom.models.source import read_config

from .chat_template import read_template
from .connection import connection_class
from .engine_config import EngineConfig
from .errors import EngineDeadError
from .frontend import Frontend
from .guidance import GuideCompiler
from .metrics import Metrics
from .middleware import JsonFormat, TextFormat
from .openai.protocol import SamplingDefaults
from .openai.service import Limits, Service
from .openai.tools import detect_parser
from .server import AppOptions, build_app
from .server_config import ServerConfig
from .startup import Ready, start_up
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Of a connection between two requests. Who closes first may meet the other's next request, which is then lost: proxies
# keep theirs for 60 s, aiohttp for 15, httpx, and so the openai client, for the 5 that uvicorn would.
KEEP_ALIVE_S = 75
CLOSE_S = 5  # for answers to reach their clients once all requests have ended
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PortError(AtomError):
    """The address cannot be listened at."""


def serve(
    model: str,
    engine: EngineConfig,
    server: ServerConfig,
    say: Callable[[str], None] = lambda text: None,
    ready: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Serve `model` until a signal comes; what was served, for programs.

    say    called with what start-up is doing
    ready  called when it is done
    Raises TemplateError, PortError, CheckpointError, UnsupportedError or ValueError before anything is served,
    EngineDeadError after.
    """
    set_up_logging(server)
    api_keys()  # what is wrong with them, or with the template, shows before the model is loaded for minutes
    if server.chat_template is not None:
        read_template(server.chat_template)
    with _ended_by_signals(), take_port(server.host, server.port) as listener:
        made = start_up(model, engine, say)
        service = make_service(model, made, engine, server)
        ready()
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _allow_connections()
        # The engine's thread must not wait for the event loop's Python longer than needed: getting the interpreter back
        # beside a busy thread took 0.7 ms in the median with this, 8 ms with Python's default of 5 ms.
        sys.setswitchinterval(0.0005)
        gc.collect()
        gc.freeze()  # the model's objects stay: no need to look at them again and again
        asyncio.run(_serve(service, server, listener, url))
    return {"model": model, "url": url, **made.facts}


def make_service(model: str, made: Ready, engine: EngineConfig, server: ServerConfig) -> Service:
    """The served model with its names, template and defaults."""
    template = None if server.chat_template is None else read_template(server.chat_template)
    tokenizer = Tokenizer(made.tokenizer, template)
    names = server.served_model_name or (model,)
    frontend = Frontend(made.engine, tokenizer, Metrics(made.engine.stats, names[0]), server.stream_interval)
    parser: str | None = server.tool_call_parser
    if parser == "auto":
        parser = detect_parser(tokenizer.chat_template)
    defaults = SamplingDefaults()
    if server.generation_config == "auto" and engine.load_format == "auto":
        defaults = SamplingDefaults.read(read_config(model, engine.revision)[1])
    compiler = None
    if made.tokenizer is not None:
        compiler = GuideCompiler(made.tokenizer, made.limits.vocab_size, made.eos_token_ids)
        compiler.prepare()
    limits = Limits(
        max_body_bytes=server.max_body_bytes,
        body_timeout_s=server.body_timeout,
        max_bodies_bytes=max(server.max_body_bytes, Limits.max_bodies_bytes),
        max_prompts=made.limits.max_waiting_requests,
    )
    return Service(
        frontend,
        tuple(names),
        root=model,
        eos_token_ids=made.eos_token_ids,
        defaults=defaults,
        limits=limits,
        tool_parser=None if parser == "none" else parser,
        compiler=compiler,
    )


@contextlib.contextmanager
def take_port(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound and does not listen yet: a taken port shows before the model is loaded. PortError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortError(
                    f"port {port} of {host} is in use; stop what has it, or choose another --port."
                ) from None
            raise PortError(
                f"cannot listen at {host}:{port} ({error.strerror or error}); choose --host, --port."
            ) from None
        yield listener


def set_up_logging(server: ServerConfig) -> None:
    """Everything to stderr, in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormat() if server.log_format == "json" else TextFormat())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("atom").setLevel(server.log_level.upper())


def _allow_connections() -> None:
    """As many open sockets as the system lets this process have; 1024 is a usual start and too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While the model is loaded: the first signal ends the process in good order, the second at once."""

    def end(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        logger.warning("stopped by %s before the server was ready", signal.Signals(number).name)
        raise SystemExit(0)

    before = {each: signal.signal(each, end) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would not wait for streams, and would end with the signal's own code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(service: Service, config: ServerConfig, listener: socket.socket, url: str) -> None:
    keys = config.api_key or api_keys()
    app = build_app(service, AppOptions(keys, config.allowed_origins))
    server = _Server(
        uvicorn.Config(
            app,
            http=connection_class(config.body_timeout),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            backlog=2048,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
        )
    )
    loop, frontend, ending = asyncio.get_running_loop(), service.frontend, set[asyncio.Task[None]]()
    death: list[str] = []

    def died(reason: str) -> None:
        death.append(reason)
        server.should_exit = True

    async def drain(name: str) -> None:
        count = frontend.num_open
        logger.warning("%s: %d requests may end within %g s, new ones are refused", name, count, config.drain_timeout)
        await frontend.drain(config.drain_timeout)
        server.should_exit = True

    def stop(number: signal.Signals) -> None:
        if ending:
            os._exit(128 + number)
        ending.add(asyncio.ensure_future(drain(number.name)))

    frontend.on_death = died
    for number in SIGNALS:
        loop.add_signal_handler(number, stop, number)
    if not keys and config.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("other machines are let in without an API key; set ATOM_API_KEY to ask for one")
    logger.info("serving %s at %s", service.names[0], url)
    await server.serve([listener])
    if death:
        raise EngineDeadError(f"the engine died ({death[0]}) and the server ended; see the log, and start it again.")
    logger.info("ended in good order")
