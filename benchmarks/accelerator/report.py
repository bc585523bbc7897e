"""The results so far as JSON and as a table, written after every row."""

import json
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Report:
    """The rows in the order of measurement. In the files they are in the order of the lines."""

    def __init__(self, file: Path, small: bool, lines: list[str]):
        self._file, self._lines, self._start = file, lines, time.time()
        self._rows: list[Row] = []
        self._about = {"sizes": "small" if small else "true", "started": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Adds a row and writes the files."""
        self._rows.append(row | {"at": round(time.time() - self._start, 1)})
        print(f"{time.time() - self._start:6.1f} s  {row['line']}: {_text(row)}", flush=True)
        self._write()

    def finish(self) -> None:
        """Adds the ratios that are computed from several lines."""
        for row in ratios(self._rows):
            self.add(row)
        self._about["seconds"] = f"{time.time() - self._start:.0f}"
        self._write()

    def table(self) -> str:
        """The rows as a Markdown table."""
        order = {name: i for i, name in enumerate([*self._lines, "ratios"])}
        rows = sorted(self._rows, key=lambda row: order.get(row["line"], len(order)))
        lines = ["| line | what | |", "|---|---|---|"]
        for row in rows:
            what = row["what"].replace("|", "\\|")
            lines.append(f"| {row['line']} | {what} | {_text(row, what=False).replace('|', chr(92) + '|')} |")
        return "\n".join(lines)

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._about | {"rows": self._rows}, indent=1) + "\n")
        self._file.with_suffix(".md").write_text(self.table() + "\n")


def ratios(rows: list[Row]) -> list[Row]:
    """The PyTorch program's time divided by ours, for a transition and for an image."""
    found = []
    for what, name in (("of a transition", "seconds a transition"), ("of an image of 50 steps", "seconds an image")):
        theirs = [(r["what"], r["numbers"][name]) for r in rows if r["line"] == "released" and name in r["numbers"]]
        ours = [r for r in rows if r["line"] in ("update", "rollout") and name in r["numbers"]]
        for label, seconds in theirs:
            for row in ours:
                numbers = {"PyTorch / here": seconds / row["numbers"][name]}
                found.append({"line": "ratios", "what": f"{what}: {label}", "numbers": numbers, "note": ""})
    return found


def _text(row: Row, what: bool = True) -> str:
    parts = [f"{name} {_number(value)}" for name, value in row["numbers"].items() if value is not None]
    text = ", ".join(parts + ([row["note"]] if row["note"] else []))
    return f"{row['what']}: {text}" if what and row["what"] else text


def _number(value: Any) -> str:
    if isinstance(value, str | int) or value == 0:
        return str(value)
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
