"""Reports: records as Markdown, CSV, one HTML page, and charts.

markdown_text([record.data]), csv_text([record.data])
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from finial.lab.analysis import energy
from finial.lab.probes.energy import Cost
from finial.lab.record import Data
from finial.lab.report.markdown import render

COLUMNS = (
    "started commit model format threads workload kind engine status reason round order value unit first_s last_s "
    "read_gb_s_before read_gb_s_after core_to_core_ns others wall_s j_per_token j_per_token_net_empty "
    "j_per_token_net_loaded tokens_per_j energy_counters"
).split()
UNAVAILABLE = "unavailable"


def markdown_text(records: Sequence[Data]) -> str:
    """One after the other."""
    return "\n".join(render(data) for data in records)


def _energy(cost: Cost | None) -> dict[str, float | str]:
    """Columns of a row's energy; a figure that was not measured is the word for it."""
    if cost is None:
        return dict.fromkeys(COLUMNS[-5:], UNAVAILABLE)
    figures = (cost.gross_j, cost.net_empty_j, cost.net_loaded_j, cost.tokens_per_j, cost.counters)
    return dict(zip(COLUMNS[-5:], [UNAVAILABLE if figure is None else figure for figure in figures], strict=True))


def csv_text(records: Sequence[Data]) -> str:
    """A line for each sample, and one for each row that has none."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    for data in records:
        for cell in data.cells.values():
            for name, row in cell.engines.items():
                head = {
                    "started": data.started,
                    "commit": data.commit,
                    "model": cell.model,
                    "format": cell.format,
                    "threads": cell.threads,
                    "workload": cell.workload.name,
                    "kind": cell.workload.kind,
                    "engine": name,
                    "status": row.status,
                    "reason": row.reason,
                    "unit": "bytes" if cell.workload.kind == "memory" else cell.workload.unit,
                    **_energy(energy(data, cell, name)),
                }
                if not row.samples:
                    table.writerow(head)
                for s in row.samples:
                    before, after = s.before, s.after
                    table.writerow(
                        {
                            **head,
                            "round": s.round,
                            "order": s.order,
                            "value": s.value,
                            "first_s": max(s.first, default=""),
                            "last_s": max(s.last, default=""),
                            "read_gb_s_before": before.read_gb_s if before else "",
                            "read_gb_s_after": after.read_gb_s if after else "",
                            "core_to_core_ns": after.core_to_core_ns if after else "",
                            "others": "" if s.others is None else s.others,
                            "wall_s": "" if s.wall_s is None else s.wall_s,
                        }
                    )
    return out.getvalue()
