"""The terminal that commands print to: results on stdout, progress on stderr."""

from rich.console import Console

console = Console()
progress_console = Console(stderr=True)
