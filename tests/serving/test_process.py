"""The server's life: port, start-up, drain, death; in this process where that shows it, in one of its own where not."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from atom.cli import main
from atom.env import api_keys
from atom.serving.chat_template import read_template
from atom.serving.errors import EngineDeadError
from atom.serving.openai.protocol import SamplingDefaults
from atom.serving.openai.service import Service
from atom.serving.process import PortError, _ended_by_signals, _serve, set_up_logging, take_port
from atom.serving.server_config import ServerConfig

from .scripted import TEMPLATE, ScriptedRunner, read_answer, scripted_service

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "x", "max_tokens": 200, "stream": True}


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, own = root.handlers[:], root.level, logging.getLogger("atom").level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("atom").setLevel(own)


def serve_while(service: Service, config: ServerConfig, client: Callable[[httpx.Client], None]) -> None:
    """Run the server in this thread as `atom serve` does, and a client in another; the client's errors are raised."""
    failed: list[BaseException] = []

    def run(url: str) -> None:
        try:
            with httpx.Client(base_url=url, timeout=10) as http:
                wait_until_up(http)
                client(http)
        except BaseException as error:
            failed.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    with take_port("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=run, args=(url,), daemon=True)
        thread.start()
        try:
            asyncio.run(_serve(service, config, listener, url))
        finally:
            thread.join(10)
            if failed:
                raise failed[0]


def wait_until_up(http: httpx.Client, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if http.get("/health").status_code == 200:
                return
        assert time.monotonic() < deadline, "the server did not come up"
        time.sleep(0.02)


def begin(http: httpx.Client) -> contextlib.AbstractContextManager[httpx.Response]:
    return http.stream("POST", "/v1/completions", json=LONG)


def test_sigterm_drains() -> None:
    service = scripted_service(ScriptedRunner(lambda request, index: "word " * 20, pause_s=0.005))

    def client(http: httpx.Client) -> None:
        with begin(http) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            late = http.post("/v1/completions", json={"prompt": "x"})
            assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
            assert late.json()["error"]["code"] == "draining"
            assert http.get("/health").status_code == 503
            rest = list(lines)
            assert '"finish_reason":"stop"' in rest[-2] and rest[-1] == "data: [DONE]"

    serve_while(service, ServerConfig(), client)
    assert service.frontend.num_open == 0 and not service.frontend.engine.healthy


@pytest.mark.parametrize("keep_s", [1, 75])
def test_a_connection_outlasts_its_clients_patience(monkeypatch: pytest.MonkeyPatch, keep_s: int) -> None:
    """By default longer than proxies and clients keep it; and the end of the server does not wait for it."""
    if keep_s == 1:
        monkeypatch.setattr("atom.serving.process.KEEP_ALIVE_S", keep_s)

    def client(http: httpx.Client) -> None:
        with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as raw:
            raw.settimeout(5)
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(raw).startswith(b"HTTP/1.1 200")
            if keep_s == 1:
                assert raw.recv(1) == b"", "it is closed after a second"
            else:
                raw.settimeout(2)
                with pytest.raises(TimeoutError):
                    raw.recv(1)
            os.kill(os.getpid(), signal.SIGTERM)
            raw.settimeout(5)
            assert raw.recv(1) == b""

    serve_while(scripted_service(ScriptedRunner()), ServerConfig(), client)


def test_what_outlasts_the_deadline_is_aborted() -> None:
    service = scripted_service(ScriptedRunner(lambda request, index: "word " * 200, pause_s=0.02))

    def client(http: httpx.Client) -> None:
        with begin(http) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(os.getpid(), signal.SIGINT)
            assert '"finish_reason":"abort"' in list(lines)[-2]

    serve_while(service, ServerConfig(drain_timeout=0.1), client)


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    service, codes = scripted_service(ScriptedRunner(lambda request, index: "word " * 20, pause_s=0.01)), list[int]()
    monkeypatch.setattr(os, "_exit", codes.append)

    def client(http: httpx.Client) -> None:
        with begin(http) as answer:
            lines = answer.iter_lines()
            next(lines)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            list(lines)

    serve_while(service, ServerConfig(), client)
    assert codes == [128 + signal.SIGTERM]


def test_a_dead_engine_ends_the_server_with_an_error() -> None:
    service = scripted_service(ScriptedRunner(faults=["1", "2", "3"]))

    def client(http: httpx.Client) -> None:
        for _ in range(3):
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code in (500, 503)

    with pytest.raises(EngineDeadError, match="3 steps in a row"):
        serve_while(service, ServerConfig(), client)


def test_a_stuck_step_ends_the_server_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atom.serving.engine.GRACE_S", 0.2)
    runner = ScriptedRunner()
    runner.gate.clear()
    service = scripted_service(runner, watchdog_s=0.3)

    def client(http: httpx.Client) -> None:
        answer = http.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and "has not ended after 0.3 s" in answer.json()["error"]["message"]

    with pytest.raises(EngineDeadError, match=r"has not ended after 0\.3 s"):
        serve_while(service, ServerConfig(), client)
    runner.gate.set()


def test_a_signal_during_start_up_ends_in_good_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, _ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert ended.value.code == 0 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff", "it is not UTF-8"),
        (b"{% for m in messages %}\n{{ m.content }}", "wrong in line 2"),
        (b"{{ messages[0 }}", "wrong in line 1"),
    ],
)
def test_a_wrong_template_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None, match: str
) -> None:
    file = tmp_path / "template.jinja"
    if text is not None:
        file.write_bytes(text)
    assert main(["serve", "no-such-model", "--port", "0", "--chat-template", str(file)]) == 1
    assert match in capsys.readouterr().err.replace("\n", " ")


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for given, keys in (("", ()), ("a", ("a",)), ("a, b,\n", ("a", "b")), ("secret\n", ("secret",))):
        monkeypatch.setenv("ATOM_API_KEY", given)
        assert api_keys() == keys
    monkeypatch.setenv("ATOM_API_KEY", " \n")
    assert main(["serve", "/no/model", "--port", "0"]) == 1
    assert "ATOM_API_KEY holds no key" in capsys.readouterr().err


def test_templates_as_models_have_them_are_read(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    for text in (TEMPLATE, "{% for m in messages %}{% if m.skip %}{% continue %}{% endif %}{% endfor %}"):
        file.write_text(text)
        assert read_template(file) == text
    file.write_text("{% generation %}x{% endgeneration %}")  # transformers' own tag
    assert read_template(file)


def test_a_taken_port_is_refused_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "/no/model", "--port", str(port)]) == 1
        assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err
    with pytest.raises(PortError, match=r"cannot listen at 203\.0\.113\.1"), take_port("203.0.113.1", 80):
        pass


def test_a_missing_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/model", "--port", "0"]) == 1
    assert "'/no/model' is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "module"),
    [("serve /no/model", "uvicorn"), ("chat http://127.0.0.1:9 --prompt x", "httpx"), ("bench serve", "httpx")],
)
def test_a_missing_package_is_told(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("atom.serving.process", "atom.commands.chat_remote", "atom.serving.bench.serve"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(command.split()) == 1
    err = capsys.readouterr().err
    assert f"needs the package {module}" in err and "atom-serving[serving]" in err


@pytest.mark.parametrize("options", [{"port": 70000}, {"max_body_bytes": 0}, {"drain_timeout": -1}, {"api_key": ("",)}])
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerConfig(**options)  # type: ignore[arg-type]


def test_logs_are_lines_of_json_without_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    service = scripted_service(ScriptedRunner())
    config = ServerConfig(log_format="json", log_level="debug")
    set_up_logging(config)

    def client(http: httpx.Client) -> None:
        body = {"prompt": "private", "max_tokens": 4}
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        assert answer.json()["choices"][0]["text"]
        http.post("/v1/completions", json={"prompt": "private", "n": -1})
        os.kill(os.getpid(), signal.SIGTERM)

    serve_while(service, config, client)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    first, second = (line for line in lines if line.get("path") == "/v1/completions")
    assert (first["status"], first["request_id"], first["prompt_tokens"]) == (200, "mine", len("private"))
    assert (first["completion_tokens"], first["finish"], second["status"]) == (4, "length", 400)
    assert "private" not in json.dumps(lines) and "Hell" not in json.dumps(lines)


def test_defaults_of_sampling_come_from_the_model() -> None:
    made = SamplingDefaults.read({"temperature": 0.7, "top_k": 20, "do_sample": True, "top_p": None})
    assert made == SamplingDefaults(temperature=0.7, top_k=20)


@pytest.mark.slow
def test_atom_serve_from_the_shell(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A model on disk, the official client, SIGTERM while a stream runs, exit code 0."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    command = [sys.executable, "-m", "atom", "serve", str(tiny("llama")), "--port", "0", "--kv-cache-bytes", "16MiB"]
    options = ["--served-model-name", "small", "--chat-template", str(template), "--log-format", "json", "--json"]
    env = {**os.environ, "ATOM_API_KEY": "secret", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *options], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if '"serving small at' in line:
                url = json.loads(line)["message"].rpartition(" ")[2]
                break
        else:
            raise AssertionError("the server did not start")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=3) as client:
            assert [m.id for m in client.models.list()] == ["small"]
            asked = {"model": "small", "messages": [{"role": "user", "content": "ab"}], "temperature": 0}
            whole = client.chat.completions.create(**asked, max_tokens=20)  # type: ignore[call-overload]
            stream = client.chat.completions.create(**asked, max_tokens=20, stream=True)  # type: ignore[call-overload]
            first = next(iter(stream))
            process.send_signal(signal.SIGTERM)
            text = "".join(e.choices[0].delta.content or "" for e in (first, *stream))
            assert text == whole.choices[0].message.content
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["url"] == url
    finally:
        process.kill()
