"""The README's table of what attention_cost.py measured, and where its target was reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch

from attnsurgeon.bench.environment import cpu_name

HALF, ELSEWHERE = 0.5, 0.8
"""Of timm's overhead: the target, and that of SK outside ONNX Runtime."""
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- cost -->\n", "<!-- end of cost -->\n"


@dataclass(frozen=True)
class Row:
    """One comparison; times in ms, the quotient of overheads with a 95 % interval."""

    block: str
    engine: str
    batch: int
    plain_ms: float
    ours_ms: float
    timm_ms: float
    quotient: tuple[float, float, float]
    limit_ms: float

    def __str__(self) -> str:
        """Return a row of a Markdown table."""
        ratio, low, high = self.quotient
        shares = [
            f"{ms:+.2f} ({100 * ms / self.plain_ms:+.1f} %)" for ms in (self.ours_ms, self.timm_ms)
        ]
        cells = [self.block, self.engine, self.batch, f"{self.plain_ms:.2f}", *shares]
        cells += [f"{ratio:.2f} [{low:.2f}, {high:.2f}]", f"+{self.limit_ms:.2f}"]
        cells.append(f"{self.ours_ms / self.limit_ms:.0f} ×" if self.ours_ms > 0 else "")
        return f"| {' | '.join(map(str, cells))} |"

    @property
    def goal(self) -> float:
        """Return what the quotient should be at most."""
        return ELSEWHERE if self.block == "sk" and self.engine != "onnxruntime" else HALF


HEAD = """| block | engine | batch | plain, ms | ours, ms | timm, ms | quotient | limit | of it |
|---|---|--:|--:|--:|--:|--:|--:|--:|"""


def table_of(found: Sequence[Row], threads: int, pixels: int, clock: str) -> str:
    """Return the table, what it was measured on, and where the target was reached."""
    reached = [row for row in found if row.quotient[0] <= row.goal]
    return "\n".join(
        [
            f"{cpu_name()}, {threads} threads, torch {torch.__version__}, ONNX Runtime "
            f"{onnxruntime.__version__}, {pixels} px, {clock}:",
            "",
            HEAD,
            *map(str, found),
            "",
            f"The target, {HALF} of timm's overhead ({ELSEWHERE} for SK outside ONNX Runtime), was "
            f"reached in {len(reached)} of {len(found)} rows.",
            "",
        ]
    )


def write_readme(text: str, readme: Path) -> None:
    """Put the text between its marks in the README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
