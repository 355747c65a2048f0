"""Which sampler finds events of seconds in half an hour of video, for equal numbers of frames chosen, or scored.

    python benchmarks/video_search.py --videos videos [--queries 45] [--minutes 30]
    python benchmarks/video_search.py --videos videos --tiny --out /tmp/results     a test of this script

Videos are composed (nothing is encoded): one to three events, all shots of bikes.mp4 that a query names ("a taxi cab"),
planted into pieces of all other known clips that do not show it, other shots of bikes.mp4 among them. A frame every
half second may be chosen. Scores are those of the scorer "concepts" (EfficientNet-Lite0 and MiniLM), whose vectors are
computed once for each frame of the sources. An event is found when a chosen frame lies in it. Spans are made of the
chosen frames and their scores alone, for every sampler by `chosen_spans`. Two kinds of events: shots as they are, and
shots cut or repeated to last 2 to 8 seconds. Writes benchmarks/results/video_search.json, .md and .png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _measure import hardware
from _report import markdown
from _runs import RESULTS, write_result

NAME = "video_search"
BUDGETS = (8, 16, 32, 64)
KINDS: dict[str, tuple[float, float] | None] = {"2 to 8 s": (2.0, 8.0), "as they are": None}
SAMPLERS = ("uniform", "top_k", "tass", "dpp", "time_search")
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
AT = 16  # frames chosen where the frames scored are varied
SETTINGS = ("minutes", "queries", "fps", "seed", "tiny")
TINY = {"minutes": 1.0, "queries": 5}


READING = """## What this says and what not

The haystack is made of 17 files, so that a picture comes two or three times in a video; `dpp` takes none twice, which
helps it here more than it would in a film. Pieces follow each other at random: what is near an event says
nothing about it, so looking closer where scores rise gains nothing in recall, and an event between two frames of the
first look of `time_search` stays unseen. With equally many frames scored, `tass` and `dpp` on a thinned video find as
many events or more. `time_search` gives its frames to the surest windows: fewer events at large budgets than with
`tass`, and about twice its mIoU, as a frame in a wrong place costs a span; its settings were chosen on 45
other videos. Of "cars in a street" and "a man in a suit" other frames score higher than the events, which no sampler
mends. Uniform sampling finds so few events that the ratio to it is a rough one."""


class Case(NamedTuple):
    """A video and a query. times, scores, features: of its candidate frames. events: (start, end)."""

    label: str
    times: np.ndarray
    scores: np.ndarray
    features: np.ndarray
    events: list[tuple[float, float]]
    seconds: float
    pieces: int
    pictures: int


class Row(NamedTuple):
    """What one sampler did in one case. found: for each event. spans: of the chosen frames."""

    found: np.ndarray
    spans: list[tuple[float, float]]
    scored: int
    chosen: int
    seconds: float


Choose = Callable[[Case, int], Any]


def source_features(composer: Any, scorer: Any, cache: Any) -> dict[tuple[str, int], np.ndarray]:
    """The vectors of every frame of the sources, by identity."""
    from seqzoo.pipelines.video.scoring.encoding import encode_video

    table: dict[tuple[str, int], np.ndarray] = {}
    paths = sorted({clip.path for clip in [*composer.events, *composer.footage]})
    from seqzoo.pipelines.video.reader import open_video

    for path in paths:
        with open_video(path, size=scorer.size) as reader:
            # as many times a second as there are frames: each of them
            found = encode_video(reader, scorer, fps=1000.0, cache=cache, progress=False)
            table.update(zip(reader.identities(found.indices), found.features, strict=True))
    return table


def compose(kind: str, options: argparse.Namespace, scorer: Any, cache: Any) -> list[Case]:
    from seqzoo.pipelines.video.composer import Composer
    from seqzoo.pipelines.video.known import bikes_events, known_clips
    from seqzoo.pipelines.video.scoring.encoding import frames_to_look_at

    composer = Composer(
        bikes_events(options.videos), known_clips(options.videos), size=scorer.size, event_seconds=KINDS[kind]
    )
    table = source_features(composer, scorer, cache)
    cases = []
    for number in range(options.queries):
        label = composer.labels[number % len(composer.labels)]
        events = 1 + number // len(composer.labels) % 3
        video = composer.plan(60 * options.minutes, [options.seed, number], labels=[label], number=events)
        indices, _ = frames_to_look_at(video, options.fps)
        pictures = video.identities(indices)
        features = np.stack([table[picture] for picture in pictures]).astype(np.float64)
        scores = features @ scorer.encode_query(label).astype(np.float64)
        truth = [(start, end) for start, end, _ in video.truth()]
        times = np.asarray(video.times)[indices]
        pieces = len(video.segments)
        cases.append(Case(label, times, scores, features, truth, video.duration, pieces, len(set(pictures))))
    composer.close()
    return cases


def sampler(name: str, **options: Any) -> Choose:
    """A sampler of the library; scores are a function, so that the frames it asks for are counted."""
    from seqzoo.pipelines.video.samplers import create_sampler

    choose = create_sampler(name, **options)

    def sample(case: Case, budget: int) -> Any:
        return choose(case.times, lambda indices: case.scores[indices], case.features, budget)

    return sample


def thinned(name: str, share: float) -> Choose:
    """A sampler that gets an even share of the frames, so that it scores no others."""
    from seqzoo.pipelines.video.samplers import create_sampler, sample_uniform

    choose = create_sampler(name)

    def sample(case: Case, budget: int) -> Any:
        number = max(round(share * len(case.times)), 1)
        kept = sample_uniform(case.times, None, None, number).indices
        found = choose(case.times[kept], lambda indices: case.scores[kept[indices]], case.features[kept], budget)
        return found._replace(indices=kept[found.indices])

    return sample


def best(case: Case, budget: int) -> Any:
    """What could be found: frames of the events, evenly over them."""
    from seqzoo.pipelines.video.samplers import Sample

    inside = np.zeros(len(case.times), dtype=bool)
    rounds: dict[int, int] = {}
    for start, end in case.events:
        own = np.flatnonzero((case.times >= start) & (case.times < end))
        rounds.update({int(frame): place for place, frame in enumerate(own.tolist())})
    frames = sorted(sorted(rounds), key=lambda frame: rounds[frame])[:budget]
    inside[frames] = True
    chosen = np.flatnonzero(inside)
    return Sample(chosen, chosen, 0)


def run(choose: Choose, cases: Sequence[Case], budget: int) -> list[Row]:
    from seqzoo.pipelines.video.metrics import events_found
    from seqzoo.pipelines.video.spans import chosen_spans

    rows = []
    for case in cases:
        begin = time.perf_counter()
        sample = choose(case, budget)
        took = time.perf_counter() - begin
        chosen = case.times[sample.indices]
        spans = chosen_spans(chosen, case.scores[sample.indices], start=0.0, end=case.seconds)
        rows.append(
            Row(
                events_found(chosen, case.events),
                [(span.start, span.end) for span in spans],
                sample.scored,
                len(chosen),
                took,
            )
        )
    return rows


def summary(rows: Sequence[Row], cases: Sequence[Case]) -> dict[str, Any]:
    """Scores over all events and queries; the error of the recall is that of resampled videos."""
    from seqzoo.pipelines.video.metrics import grounding_scores

    found, number = np.array([row.found.sum() for row in rows]), np.array([len(row.found) for row in rows])
    draws = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    spread = (found[draws].sum(1) / number[draws].sum(1)).std()
    scores = grounding_scores([case.events for case in cases], [row.spans for row in rows])
    by_label = {
        label: [
            int(sum(row.found.sum() for row, case in zip(rows, cases, strict=True) if case.label == label)),
            int(sum(len(row.found) for row, case in zip(rows, cases, strict=True) if case.label == label)),
        ]
        for label in sorted({case.label for case in cases})
    }
    return {
        "recall": round(float(found.sum() / number.sum()), 4),
        "error": round(float(spread), 4),
        "found": int(found.sum()),
        "events": int(number.sum()),
        "queries with an event": round(float((found > 0).mean()), 4),
        **{key: round(value, 4) for key, value in scores.items()},
        "scored": round(float(np.mean([row.scored for row in rows])), 1),
        "chosen": round(float(np.mean([row.chosen for row in rows])), 1),
        "ms": round(1000 * float(np.mean([row.seconds for row in rows])), 2),
        "by label": by_label,
    }


def haystack(cases: Sequence[Case]) -> dict[str, Any]:
    """How hard it is to find the events."""
    lengths = np.array([end - start for case in cases for start, end in case.events])
    inside = [int(((case.times >= start) & (case.times < end)).sum()) for case in cases for start, end in case.events]
    frames = [len(case.times) for case in cases]
    ranks = []
    for case in cases:
        own = np.zeros(len(case.times), dtype=bool)
        for start, end in case.events:
            own |= (case.times >= start) & (case.times < end)
        if own.any():
            ranks.append(int((case.scores[~own] > case.scores[own].max()).sum()))
    return {
        "queries": len(cases),
        "events": len(lengths),
        "seconds of an event, least, median, most": [round(float(x), 2) for x in np.percentile(lengths, (0, 50, 100))],
        "frames in an event, least, median, most": [int(x) for x in np.percentile(inside, (0, 50, 100))],
        "events without a frame": int(np.sum(np.array(inside) == 0)),
        "share of the frames that show an event": round(float(np.sum(inside) / np.sum(frames)), 5),
        "frames of a video": round(float(np.mean(frames)), 1),
        "different pictures among them": round(float(np.mean([case.pictures for case in cases])), 1),
        "pieces of a video": round(float(np.mean([case.pieces for case in cases])), 1),
        "other frames above the best of the events, median": float(np.median(ranks)) if ranks else None,
        "queries in which the best frame is in an event": int(np.sum(np.array(ranks) == 0)),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from seqzoo.pipelines.video.cache import FeatureCache
    from seqzoo.pipelines.video.scoring.scorer import create_scorer

    cache = FeatureCache(options.cache)
    scorer = create_scorer("concepts", cache=cache, device="cpu")
    cells, costs, stacks = [], [], {}
    for kind in KINDS:
        begin = time.perf_counter()
        cases = compose(kind, options, scorer, cache)
        stacks[kind] = haystack(cases)
        print(f"{kind}: {len(cases)} videos in {time.perf_counter() - begin:.1f} s; {stacks[kind]}", flush=True)
        chosen: dict[str, Choose] = {name: sampler(name) for name in SAMPLERS}
        for name, choose in {**chosen, "(most that can be found)": best}.items():
            for budget in BUDGETS:
                scores = summary(run(choose, cases, budget), cases)
                cells.append({"kind": kind, "sampler": name, "budget": budget, **scores})
        for share in SHARES:
            ways = {
                "time_search": sampler("time_search", max_scored=max(round(share * len(cases[0].times)), 1)),
                **{name: thinned(name, share) for name in ("top_k", "tass", "dpp")},
            }
            for name, choose in ways.items():
                scores = summary(run(choose, cases, AT), cases)
                costs.append({"kind": kind, "sampler": name, "share": share, **scores})
        print(markdown(table(cells, kind, options.queries)), flush=True)
    return {"haystacks": stacks, "cells": cells, "costs": costs}


def table(cells: Sequence[dict[str, Any]], kind: str, queries: int) -> list[dict[str, Any]]:
    """A line for each sampler: recall and mIoU by budget, and what it costs. queries: videos of each kind."""
    lines: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell["kind"] == kind:
            line = lines.setdefault(cell["sampler"], {"sampler": cell["sampler"]})
            line[f"recall, {cell['budget']}"] = f"{cell['recall']:.3f} ± {cell['error']:.3f}"
    for cell in cells:
        if cell["kind"] == kind:
            lines[cell["sampler"]][f"mIoU, {cell['budget']}"] = f"{cell['miou']:.3f}"
    for cell in cells:
        if cell["kind"] == kind and cell["budget"] == AT:
            cost = "" if cell["sampler"].startswith("(") else f"{cell['scored']:.0f}"
            lines[cell["sampler"]][f"frames scored, {AT}"] = cost
            # what is chosen is decoded too, where no score was asked
            decoded = queries * max(cell["scored"], cell["chosen"]) / max(cell["found"], 1)
            lines[cell["sampler"]][f"decoded for an event found, {AT}"] = f"{decoded:.0f}" if cost else ""
    return list(lines.values())


def ratios(cells: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """How many times the events of uniform sampling each sampler finds with AT frames."""
    own = {cell["sampler"]: cell for cell in cells if cell["kind"] == kind and cell["budget"] == AT}
    number = own["uniform"]["events"]
    found = [f"uniform sampling finds {own['uniform']['found']} of {number} events"]
    for name in SAMPLERS[1:]:
        times = own[name]["found"] / max(own["uniform"]["found"], 1)
        found.append(f"{name} {own[name]['found']} ({times:.1f} times as many)")
    return found


def cost_table(costs: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """A line for each sampler: recall at AT frames by the share of the frames that are scored."""
    lines: dict[str, dict[str, Any]] = {}
    for cell in costs:
        if cell["kind"] == kind:
            line = lines.setdefault(cell["sampler"], {"sampler": cell["sampler"]})
            line[f"1/{round(1 / cell['share'])}" if cell["share"] < 1 else "all"] = f"{cell['recall']:.3f}"
    return list(lines.values())


def label_table(cells: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """A line for each sampler: events found of each label at AT frames."""
    return [
        {
            "sampler": cell["sampler"],
            **{label: f"{found} of {number}" for label, (found, number) in cell["by label"].items()},
        }
        for cell in cells
        if cell["kind"] == kind and cell["budget"] == AT
    ]


def draw(record: dict[str, Any], path: Path) -> None:
    """Recall against frames chosen, for both kinds of events, and against frames scored."""
    from seqzoo.pipelines.pictures import MARKERS, OTHERS, TRUTH, can_draw, new_figure

    if not can_draw("the search"):
        return
    colours = dict(zip(SAMPLERS, (OTHERS[5], OTHERS[3], "#0072B2", OTHERS[2], OTHERS[0]), strict=True))
    markers = dict(zip(SAMPLERS, MARKERS, strict=False))
    kinds = list(KINDS)
    with new_figure(path) as figure:
        figure.set_size_inches(11.0, 3.9)
        axes = figure.subplots(1, 3)
        for panel, kind in zip(axes, kinds, strict=False):
            for name in (*SAMPLERS, "(most that can be found)"):
                own = [c for c in record["cells"] if c["kind"] == kind and c["sampler"] == name]
                x, y = [c["budget"] for c in own], [c["recall"] for c in own]
                if name in colours:
                    panel.errorbar(
                        x, y, [c["error"] for c in own], color=colours[name], marker=markers[name], ms=4, capsize=2,
                        elinewidth=0.8, label=name,
                    )  # fmt: skip
                else:
                    panel.plot(x, y, color=TRUTH, linestyle=":", linewidth=1, label="most that can be found")
            panel.set_xscale("log", base=2)
            panel.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
            panel.set_xlabel("frames chosen")
            number = record["haystacks"][kind]["events"]
            panel.set_title(f"{number} events, {kind if kind[0].isdigit() else 'shots ' + kind}", fontweight="bold")
        axes[0].set_ylabel("share of the events with a chosen frame")
        panel, kind = axes[2], kinds[0]
        for name in ("top_k", "tass", "dpp", "time_search"):
            own = [c for c in record["costs"] if c["kind"] == kind and c["sampler"] == name]
            panel.plot(
                [c["scored"] for c in own], [c["recall"] for c in own], color=colours[name], marker=markers[name], ms=4
            )
        panel.set_xscale("log", base=2)
        ticks = [c["scored"] for c in record["costs"] if c["kind"] == kind and c["sampler"] == "tass"][1::2]
        panel.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        panel.set_xlabel("frames scored")
        panel.set_title(f"events of {kind}, {AT} frames chosen", fontweight="bold")
        for panel in axes:
            panel.set_ylim(0, 1.03)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)


def page(record: dict[str, Any], command: str) -> str:
    parts = [
        "# Events in half an hour of video",
        f"`{command}`, on a CPU. {' '.join((__doc__ or '').split('    python')[0].split())} "
        + " ".join((__doc__ or "").split("/tmp/results     a test of this script")[1].split()),
        f"![recall against frames]({NAME}.png)",
    ]
    for kind in KINDS:
        name = kind if kind[0].isdigit() else f"shots {kind}"
        facts = record["haystacks"][kind]
        parts += [
            f"## Events: {name}",
            markdown(table(record["cells"], kind, record["settings"]["queries"])),
            f"With {AT} frames: " + ", ".join(ratios(record["cells"], kind)) + ".",
            "Recall: the share of the events with a chosen frame in them, ± the standard error over videos. mIoU: over "
            "queries, of the union of the spans. The last line chooses with the truth: some events lie between frames, "
            "and spans of frames are not exact.",
            f"Recall with {AT} frames where only a share of the frames may be scored (top_k, tass and dpp get an even "
            "share of them):",
            markdown(cost_table(record["costs"], kind)),
            f"Events found with {AT} frames by what is asked for:",
            markdown(label_table(record["cells"], kind)),
            "The haystack: " + "; ".join(f"{key}: {value}" for key, value in facts.items()) + ".",
        ]
    return "\n\n".join([*parts, READING]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of the known videos")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of a video")
    parser.add_argument("--queries", type=int, default=45, help="videos, each with a query")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second that may be chosen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=None, help="folder of vectors of frames; the user's otherwise")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="short videos: a test of this script, not a measurement")
    options = parser.parse_args()
    if options.tiny:
        if options.out is None:
            parser.error("--tiny measures nothing that is worth keeping: give --out, a folder of its own")
        vars(options).update(TINY)
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in SETTINGS}
    changed = [key for key, value in settings.items() if key != "tiny" and value != parser.get_default(key)]
    given = [f"--{key} {settings[key]}" for key in changed]
    command = " ".join([f"python benchmarks/{NAME}.py --videos videos", *given])
    record = {"settings": settings, "hardware": hardware(torch.device("cpu")), "command": command, **measure(options)}
    folder = options.out or RESULTS
    write_result(NAME, record, folder)
    draw(record, folder / f"{NAME}.png")
    (folder / f"{NAME}.md").write_text(page(record, command), encoding="utf-8")


if __name__ == "__main__":
    main()
