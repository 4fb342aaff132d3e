"""What the clients were seen to do, as the rows of docs/clients.md's table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_xielu.ops.cpu.build import cache_folder

COMMITTED = Path(__file__).parents[2] / "docs/benchmarks/clients.json"


@dataclass(frozen=True)
class Figure:
    """A measured number and the limit that the test held it to."""

    name: str
    value: float
    limit: float


@dataclass
class Record:
    """By client and model: its version, whether it runs the model, and the figures or its words."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def runs(self, client: str, version: str, model: str, *figures: Figure) -> None:
        """A client computes what Megatron does: every figure is within its limit."""
        print(f"\n{client} {version}, {model}:", *(f"{f.name} {f.value:.2g}" for f in figures))
        self.rows[f"{client}, {model}"] = {
            "version": version,
            "runs": True,
            "figures": [asdict(figure) for figure in figures],
        }
        for figure in figures:
            assert figure.value <= figure.limit, figure

    def refuses(self, client: str, version: str, model: str, words: str) -> None:
        """A client, or the conversion for it, says that it cannot hold the model."""
        print(f"\n{client} {version}, {model}: {words}")
        self.rows[f"{client}, {model}"] = {"version": version, "runs": False, "words": words}

    def save(self) -> Path:
        """Writes the rows to the user's cache and returns the file."""
        path = cache_folder() / "clients" / "seen.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return path


def without_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what may differ from machine to machine left out."""
    figures = [{**figure, "value": None} for figure in row.get("figures", [])]
    return {**row, "figures": figures}
