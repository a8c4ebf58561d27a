"""What a person sees while a model is quantized: layer, share done, time left, peak memory."""

from typing import Any, Protocol, Self

from .clock import peak_host_bytes


class Progress(Protocol):
    """Told about a run as it goes; a context manager around it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def layer(self, index: int, total: int, doing: str) -> None: ...
    def done(self, record: dict[str, Any]) -> None: ...
    def step(self, number: int, total: int, loss: float) -> None: ...
    def remark(self, text: str) -> None: ...


class Silent:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def layer(self, index: int, total: int, doing: str) -> None:
        return None

    def done(self, record: dict[str, Any]) -> None:
        return None

    def step(self, number: int, total: int, loss: float) -> None:
        return None

    def remark(self, text: str) -> None:
        return None


class Bar:
    """A rich progress bar on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[layers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[memory]}"),
            console=Console(stderr=True),
        )
        self._total = 0
        self._task = self._progress.add_task("reading", total=None, layers="", memory="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def layer(self, index: int, total: int, doing: str) -> None:
        self._progress.update(
            self._task,
            description=f"layer {index}: {doing}",
            completed=index,
            total=total,
            layers=f"{index}/{total} layers",
            memory=self._memory(0),
        )
        self._total = total

    def done(self, record: dict[str, Any]) -> None:
        done = record["layer"] + 1
        self._progress.update(
            self._task,
            completed=done,
            layers=f"{done}/{self._total} layers",
            memory=self._memory(record["peak_gpu_bytes"]),
        )

    def step(self, number: int, total: int, loss: float) -> None:
        """A step of distillation; the loss is in nats a token."""
        self._progress.update(
            self._task,
            description=f"distilling, {loss:.4f} nats",
            completed=number,
            total=total,
            layers=f"{number}/{total} steps",
            memory=self._memory(0),
        )

    def remark(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._progress.console.print(text)

    def _memory(self, gpu_bytes: int) -> str:
        host = f"peak {peak_host_bytes() / 2**30:.1f} GiB"
        return f"{host}, GPU {gpu_bytes / 2**30:.1f} GiB" if gpu_bytes else host
