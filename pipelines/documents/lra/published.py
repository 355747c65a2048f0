"""Published accuracies on Long Range Arena, in per cent, as data: to be printed beside our own, never among them.

Block "A" is the leaderboard of the release (arXiv:2011.04006 and its repository), block "B" later work. A row's average
is over the five tasks without Path-X or over all six, as its source does it; `Row.mean` recomputes it. Most rows
average over five where Path-X fails; some papers count a failure as 50: `Row.mean_with_chance`. Rows that
were not read from their authors' own tables when this was written say so (`checked`).
"""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "path_x")
TITLES = {
    **{"listops": "ListOps", "text": "Text", "retrieval": "Retrieval"},
    **{"image": "Image", "pathfinder": "Pathfinder", "path_x": "Path-X"},
}
# the accuracy of giving the most frequent label always; ListOps' is that of its generator
MAJORITY = {"listops": 17.0, "text": 50.0, "retrieval": 50.0, "image": 10.0, "pathfinder": 50.0, "path_x": 50.0}
FAIL = "FAIL"  # did not rise above chance, or did not fit into memory
_AT_CHANCE = 1.1  # points above the majority baseline of ListOps within which a row counts as at chance
_RELEASE = "LRA leaderboard (arXiv:2011.04006)"
_EXTERNAL = "LRA leaderboard, external entry"
_S4_REPOSITORY = "S4 repository"
_FLASH = "arXiv:2205.14135"
_OPEN = "not yet read from the paper's own table"
SINKHORN = "the printed average, 51.29, is not that of the row"


@dataclass(frozen=True)
class Row:
    """scores: one per task of TASKS; None where the source has none. printed: the source's own average, or None.
    tasks: how many tasks that average is over, 5 or 6. source: whose row it is. note: what is odd. checked: whether it
    was read from the authors' leaderboard or repository; the others are quoted second hand."""

    model: str
    block: str
    source: str
    scores: tuple[float | str | None, ...]
    printed: float | None
    tasks: int
    note: str = ""
    checked: bool = False

    def __getitem__(self, task: str) -> float | str | None:
        return self.scores[TASKS.index(task)]

    @property
    def mean(self) -> float | None:
        """The average over the row's tasks; None where one of them has no number."""
        return _mean(self.scores[: self.tasks])

    @property
    def mean_with_chance(self) -> float | None:
        """The average over all six tasks with chance in the place of each failure; None where a score is unknown."""
        return _mean(tuple(MAJORITY[t] if s == FAIL else s for t, s in zip(TASKS, self.scores, strict=True)))

    @property
    def at_chance(self) -> tuple[str, ...]:
        """The tasks on which the row is no better than always giving the most frequent label (ListOps: by a point)."""
        near = []
        for task, score in zip(TASKS, self.scores, strict=True):
            margin = _AT_CHANCE if task == "listops" else 0.0
            if isinstance(score, float | int) and score <= MAJORITY[task] + margin:
                near.append(task)
        return tuple(near)


def _mean(scores: tuple[float | str | None, ...]) -> float | None:
    numbers = [score for score in scores if isinstance(score, float | int)]
    return sum(numbers) / len(numbers) if len(numbers) == len(scores) else None


def _row(line: str, block: str, source: str, tasks: int = 0, note: str = "") -> Row:
    """A row from `model|six scores|average`; five tasks where Path-X has no number, else six, unless said otherwise."""
    model, *cells = line.split("|")
    values = [None if cell in ("-", "NA") else FAIL if cell == FAIL else float(cell) for cell in cells]
    *scores, printed = values
    if len(scores) != len(TASKS) or printed == FAIL:
        raise ValueError(f"not a row of {len(TASKS)} scores and an average: {line!r}")
    tasks = tasks or (6 if isinstance(scores[-1], float) else 5)
    checked = source in (_RELEASE, _EXTERNAL, _S4_REPOSITORY)
    return Row(model, block, source, tuple(scores), printed, tasks, note, checked)  # type: ignore[arg-type]


PUBLISHED: tuple[Row, ...] = (
    _row("Local Attention|15.82|52.98|53.39|41.46|66.63|FAIL|46.06", "A", _RELEASE),
    _row("Linear Transformer|16.13|65.90|53.09|42.34|75.30|FAIL|50.55", "A", _RELEASE),
    _row("Reformer|37.27|56.10|53.40|38.07|68.50|FAIL|50.67", "A", _RELEASE),
    _row("Sparse Transformer|17.07|63.58|59.59|44.24|71.71|FAIL|51.24", "A", _RELEASE),
    _row("Sinkhorn Transformer|33.67|61.20|53.83|41.23|67.45|FAIL|51.29", "A", _RELEASE, note=SINKHORN),
    _row("Linformer|35.70|53.94|52.27|38.56|76.34|FAIL|51.36", "A", _RELEASE),
    _row("Performer|18.01|65.40|53.82|42.77|77.05|FAIL|51.41", "A", _RELEASE),
    _row("Synthesizer|36.99|61.68|54.67|41.61|69.45|FAIL|52.88", "A", _RELEASE),
    _row("Longformer|35.63|62.85|56.89|42.22|69.71|FAIL|53.46", "A", _RELEASE),
    _row("Transformer|36.37|64.27|57.46|42.44|71.40|FAIL|54.39", "A", _RELEASE),
    _row("BigBird|36.05|64.02|59.29|40.83|74.87|FAIL|55.01", "A", _RELEASE),
    _row("IGLOO|39.23|82|75.5|47.0|67.50|NA|62.25", "A", _EXTERNAL),
    _row("TLB|37.05|81.88|76.91|57.51|79.06|FAIL|66.48", "A", _EXTERNAL),
    _row("Transformer (re-run)|37.11|65.21|79.14|42.94|71.83|FAIL|59.24", "B", "arXiv:2209.10655"),
    _row("Luna-256|37.98|65.78|79.56|47.86|78.55|FAIL|61.95", "B", "arXiv:2106.01540"),
    _row("Nystromformer|37.15|65.52|79.56|41.58|70.94|FAIL|58.95", "B", "arXiv:2102.03902"),
    _row("FNet|35.33|65.11|59.61|38.67|77.80|FAIL|55.30", "B", "arXiv:2105.03824"),
    _row("H-Transformer-1D|49.53|78.69|63.99|46.05|68.78|FAIL|61.41", "B", "arXiv:2107.11906"),
    _row("CCNN|43.60|84.08|FAIL|88.90|91.51|FAIL|-", "B", "arXiv:2206.03398"),
    _row("S4 v1|58.35|76.02|87.09|87.26|86.05|88.10|80.48", "B", "arXiv:2111.00396"),
    _row("S4 (LegS)|59.60|86.82|90.90|88.65|94.20|96.35|86.09", "B", "arXiv:2206.12037"),
    _row("S4 (reproduction)|59.5|86.5|91.0|88.5|94.0|96.0|85.9", "B", _S4_REPOSITORY),
    _row("S4D-LegS|60.47|86.18|89.46|88.19|93.06|91.95|84.89", "B", "arXiv:2206.11893"),
    _row("DSS|60.6|84.8|87.8|85.7|84.6|87.8|81.88", "B", "arXiv:2203.14343"),
    _row("SGConv|61.45|89.20|91.11|87.97|95.46|97.83|87.17", "B", "arXiv:2210.09298"),
    _row("S5|62.15|89.31|91.40|88.00|95.33|98.58|87.46", "B", "arXiv:2208.04933"),
    _row("Liquid-S4|62.75|89.02|91.20|89.50|94.80|96.66|87.32", "B", "arXiv:2209.12951"),
    _row("LRU|60.2|89.4|89.9|89.0|95.1|94.2|86.3", "B", "arXiv:2303.06349"),
    _row("MEGA|63.14|90.43|91.25|90.44|96.01|97.98|88.21", "B", "arXiv:2209.10655"),
    _row("MEGA-chunk|58.76|90.19|90.97|85.80|94.41|93.81|85.66", "B", "arXiv:2209.10655"),
    _row("Flowformer|38.70|64.29|62.24|43.20|73.95|-|56.48", "B", "arXiv:2202.06258"),
    _row("Transformer (FlashAttention)|36.0|63.6|81.6|42.3|72.7|FAIL|59.3", "B", _FLASH),
    _row("FlashAttention|37.6|63.9|81.4|43.5|72.7|61.4|59.8", "B", _FLASH, tasks=5),
    _row("Block-sparse FlashAttention|37.0|63.0|81.3|43.6|73.3|56.0|59.6", "B", _FLASH, tasks=5),
    _row("TCNCA|-|-|-|-|-|-|-", "B", "arXiv:2312.05605", note=_OPEN),
    _row("LongVQ|-|-|-|-|-|-|-", "B", "arXiv:2404.11163", note=_OPEN),
)
