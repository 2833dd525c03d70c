"""One row of results, and its CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider in one cell. Times are microseconds; None (an empty CSV field) is 'not measured'.

    `operations` and `bytes` are what the operation must do and move at least, whoever does it: the rates of all
    providers are of the same work. `traffic` names the ceiling the bytes are held against (read or copy; none for warm
    weights, which come out of a cache). `samples` are those the percentiles come from, `disturbed` those in which
    another process held a core (they count only where fewer than five others exist; then `quiet` is 0).
    """

    op: str
    variant: str
    provider: str
    shape: str
    dtype: str
    cache: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    operations: int | None = None
    bytes: int | None = None
    traffic: str = ""
    tops: float | None = None
    gbps: float | None = None
    ceiling: str = ""
    ceiling_percent: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    rel_error: float | None = None
    samples: int | None = None
    disturbed: int | None = None
    quiet: int | None = None
    note: str = ""
    threads: int | None = None
    device: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    def against(self, ceilings: dict[str, float]) -> Row:
        """The row with the ceiling that binds it, and how much of it p50 reaches.

        Args:
            ceilings: operations per second by arithmetic, bytes per second as "read" and "copy".
        """
        if self.p50_us is None:
            return self
        kind = self.arithmetic
        floors = [(self.operations / ceilings[kind], kind)] if self.operations and kind in ceilings else []
        if self.bytes and self.traffic in ceilings:
            floors.append((self.bytes / ceilings[self.traffic], self.traffic))
        if not floors:
            return self
        seconds, kind = max(floors)
        return dataclasses.replace(self, ceiling=kind, ceiling_percent=1e8 * seconds / self.p50_us)

    @property
    def measured(self) -> bool:
        return self.p50_us is not None

    @property
    def ours(self) -> bool:
        return self.provider.startswith("pykernels")

    @property
    def cell(self) -> tuple[str, str, str, str]:
        return self.op, self.variant, self.shape, self.cache

    @property
    def arithmetic(self) -> str:
        """Whose rate the operations are held against: int8 for what is quantised, else the dtype."""
        return "int8" if "int8" in self.op else self.dtype

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape's numbers: "16x4096x4096" is (16, 4096, 4096); empty for a row without one."""
        return tuple(int(part) for part in self.shape.split("x")) if self.shape else ()


_FIELDS = dataclasses.fields(Row)
_INTEGERS = {f.name for f in _FIELDS if str(f.type).startswith("int")}
_FLOATS = {f.name for f in _FIELDS if str(f.type).startswith("float")}


def _text(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in _FIELDS])
        for row in rows:
            writer.writerow([_text(getattr(row, f.name)) for f in _FIELDS])


def read_csv(path: Path) -> list[Row]:
    """Reads what write_csv wrote; a file with other columns raises ValueError naming them."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [f.name for f in _FIELDS]
        if reader.fieldnames is None or list(reader.fieldnames) != names:
            raise ValueError(f"{path}: columns are {reader.fieldnames}, accepts {names}")
        return [_row(record) for record in reader]


def _row(record: dict[str, str]) -> Row:
    fields: dict[str, Any] = {name: _parse(name, text) for name, text in record.items()}
    return Row(**fields)


def _parse(name: str, text: str) -> object:
    if name in _INTEGERS:
        return int(text) if text else None
    if name in _FLOATS:
        return float(text) if text else None
    return text


def ceilings_of(rows: Iterable[Row]) -> dict[str, float]:
    """The ceiling rows as rates per second, the higher of two of the same kind."""
    found: dict[str, float] = {}
    for row in rows:
        rate = row.tops * 1e12 if row.tops else row.gbps * 1e9 if row.gbps else 0.0
        if row.op == "ceiling" and rate > found.get(row.variant, 0.0):
            found[row.variant] = rate
    return found


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """The new rows, and the old ones of cells that were not measured again or were measured in more quiet before.

    A cell changes as a whole, so ratios stay within one run. Of the ceilings the higher of each kind stays, and every
    row is held against those: a second run can lower a percentage and never raise it by a worse ceiling.
    """
    before, after = _quiet_rows(old), _quiet_rows(new)
    kept_old = {cell for cell, quiet in before.items() if quiet > after.get(cell, -1)}
    again = {row.cell[:3] for row in new}
    merged = [row for row in new if row.op != "ceiling" and row.cell not in kept_old]
    merged += [row for row in old if row.op != "ceiling" and (row.cell in kept_old or row.cell[:3] not in again)]
    ceilings = [row for row in old + new if row.op == "ceiling"]
    best = ceilings_of(ceilings)
    top = {row.variant: row for row in ceilings if ceilings_of([row]).get(row.variant) == best.get(row.variant)}
    return list(top.values()) + [row.against(best) for row in sorted(merged, key=_order)]


def _quiet_rows(rows: list[Row]) -> dict[tuple[str, str, str, str], int]:
    """For each measured cell, how many of its rows rest on clean samples."""
    found: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row.measured:
            found[row.cell] = found.get(row.cell, 0) + (row.quiet or 0)
    return found


def _order(row: Row) -> tuple[str, str, str, list[int]]:
    return row.op, row.variant, row.cache, [*row.dims[1:], row.dims[0]]


def to_json(rows: Iterable[Row]) -> str:
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)


def fastest_peer(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """For each cell, the measured provider with the lowest p50 that is not pykernels."""
    best: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if row.op == "ceiling" or row.ours or row.p50_us is None or row.provider.startswith("C loop"):
            continue
        held = best.get(row.cell)
        if held is None or held.p50_us is None or row.p50_us < held.p50_us:
            best[row.cell] = row
    return best


def ratios(rows: list[Row]) -> list[tuple[Row, Row, float]]:
    """(ours, fastest peer, peer time / our time) for each cell that has both."""
    best = fastest_peer(rows)
    found = []
    for row in rows:
        peer = best.get(row.cell)
        if row.ours and row.p50_us is not None and peer is not None and peer.p50_us is not None:
            found.append((row, peer, peer.p50_us / row.p50_us))
    return found
