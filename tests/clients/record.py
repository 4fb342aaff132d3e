"""What the clients were seen to do: the rows of docs/clients.md's table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_xielu.ops.cpu.build import cache_folder

COMMITTED = Path(__file__).parents[2] / "docs/benchmarks/clients.json"
Rows = dict[str, dict[str, Any]]
"""By client, its version and, by model, what it did."""


@dataclass(frozen=True)
class Figure:
    """A measured number and the limit that the test held it to."""

    name: str
    value: float
    limit: float


@dataclass
class Record:
    """Filled by the tests, one row for each client and model."""

    rows: Rows = field(default_factory=dict)

    def runs(self, client: str, version: str, model: str, *figures: Figure) -> None:
        """A client computes what Megatron does; fails unless every figure is within its limit."""
        print(f"\n{client} {version}, {model}:", *(f"{f.name} {f.value:.2g}" for f in figures))
        for figure in figures:
            assert figure.value <= figure.limit, figure
        self._add(client, version, model, {"figures": [asdict(figure) for figure in figures]})

    def refuses(self, client: str, version: str, model: str, words: str) -> None:
        """A client, or the conversion for it, says that it cannot hold the model."""
        print(f"\n{client} {version}, {model}: {words}")
        self._add(client, version, model, {"refuses": words})

    def _add(self, client: str, version: str, model: str, row: dict[str, Any]) -> None:
        seen = self.rows.setdefault(client, {"version": version, "models": {}})
        seen["models"][model] = row

    def save(self) -> Path:
        """Writes the rows to the user's cache and returns the file."""
        path = cache_folder() / "clients" / "seen.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        return path


def outline(rows: Rows) -> dict[tuple[str, str], Any]:
    """By client and model the version, words, names and limits: the same on every machine."""
    found = {}
    for client, seen in rows.items():
        for model, row in seen["models"].items():
            limits = [(figure["name"], figure["limit"]) for figure in row.get("figures", [])]
            found[client, model] = (seen["version"], row.get("refuses"), limits)
    return found
