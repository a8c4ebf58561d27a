"""The terminal that commands print to: tables and progress on stderr's side of the screen, results on stdout."""

from rich.console import Console

console = Console()
