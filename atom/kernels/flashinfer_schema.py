"""What definitions of every op share in FlashInfer-Trace's schema: how a solution of ours is written down."""

from typing import Any

Json = dict[str, Any]


def written_solution(definition: Json, description: str, lines: list[str]) -> Json:
    """Our kernels behind a definition: `lines` of a Python file whose `run` takes the definition's inputs."""
    return {
        "name": f"atom_{definition['name'].removeprefix('atom_')}_sm90",
        "definition": definition["name"],
        "author": "atom",
        "description": description,
        "spec": {
            "language": "python",
            "target_hardware": ["NVIDIA H200"],
            "entry_point": "main.py::run",
            "dependencies": ["atom-serving"],
            "destination_passing_style": False,
            "binding": None,
        },
        "sources": [{"path": "main.py", "content": "\n".join(lines) + "\n"}],
    }
