"""The compatibility table of docs/clients.md, from what `make test-clients` saw.

python tools/clients_table.py          prints the table of docs/benchmarks/clients.json
python tools/clients_table.py SEEN     takes over what the tests have written (they name the
                                       file), and replaces the table in docs/clients.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORD = DOCS / "benchmarks" / "clients.json"
BEGIN, END = "<!-- the table begins -->\n", "<!-- the table ends -->\n"


def main() -> None:
    rows: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if len(sys.argv) == 1:
        print(table(rows), end="")
        return
    for client, seen in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        kept = rows.get(client, {}).get("models", {})
        rows[client] = {"version": seen["version"], "models": kept | seen["models"]}
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = DOCS / "clients.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + table(rows) + END + after, encoding="utf-8")


def table(rows: dict[str, Any]) -> str:
    """Markdown: a line for each client, a column for each model."""
    models = list(dict.fromkeys(model for seen in rows.values() for model in seen["models"]))
    lines = [["client", "version", *models], ["---"] * (2 + len(models))]
    for client, seen in rows.items():
        cells = [cell(seen["models"].get(model)) for model in models]
        lines.append([client, seen["version"], *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not tried"
    if "refuses" in row:
        return f"no: {row['refuses']}"
    figures = ", ".join(f"{each['name']} {number(each['value'])}" for each in row["figures"])
    return f"yes: {figures}"


def number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    main()
