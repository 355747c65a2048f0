"""Model cards, made from a saved model's config and its record alone.

`write_cards` writes `model_cards/<model>.<tag>.md` for all weights that ship (`python docs/tables.py` calls it),
`stale_cards` names those that are missing, left over or not what it would write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._files import WEIGHTS, read_config, write_text
from ._weights import LOWER_IS_BETTER, Weights, known_weights, weights_folder, weights_of_config

_PIPELINE_TAGS = {
    "text": "text-generation",
    "documents": "text-classification",
    "forecasting": "time-series-forecasting",
    "audio_classify": "audio-classification",
    "video_classify": "video-classification",
    "image": "image-classification",
}
# What stands behind `model = ...` in a card whose record gives no lines of its own.
_USAGE = {
    "text": (
        'answer = seqzoo.generate(model, b"def main(", max_new_tokens=40, seed=0)[0]',
        "print(bytes(answer.tolist()))",
    ),
    "forecasting": (
        "(batch,) = model.example_inputs()  # put your last steps, scaled, into batch['past_target'], (B, L, C)",
        "print(model.output.point(model(batch)).shape)",
    ),
    "labels": (
        "logits = model(*model.example_inputs()).y",
        'print(model.preprocessing["labels"][int(logits[0].argmax())])',
    ),
}
_GENERAL = (
    "outputs = model(*model.example_inputs())  # what it takes is in model.input_spec",
    'print(getattr(outputs, "y", outputs).shape)',
)


def model_card(config: Mapping[str, Any], where: str, *, shipped: bool = False) -> str:
    """The card of a saved model, in the form of the Hugging Face hub.

    config: its config.json. where: what `load_model` takes, a folder or "org/name"; shipped: it is weights that ship.
    """
    from ._registry import mixer_names, model_info

    record = weights_of_config(config, where)
    info = model_info(config["name"])
    title = record.name if record is not None else config["name"]
    mixers = mixer_names(config["options"].get("mixer")) or list(info.mixers)
    rows = [f"# {title}", f"{info.summary} {info.cls.__name__}, {_link(info.paper)}."]
    if record is not None and record.purpose:
        rows += ["## What it is for", record.purpose]
    if record is not None and record.limits:
        rows += ["## What it is not for", "\n".join(f"- {limit}" for limit in record.limits)]
    rows += ["## Use", f"```python\n{usage(config, where, shipped=shipped)}\n```"]
    if record is not None and record.results:
        rows += ["## Results", _results(record)]
    if record is not None and record.command:
        rows += ["## How it was made", f"```sh\n{record.command}\n```", _made(record)]
    takes = dict(record.input) if record is not None else {}
    facts = {
        "parameters": f"{config['num_parameters']:,}",
        "weights": f"{WEIGHTS}, {config.get('dtype', 'float32')}, sha256 `{config['sha256']}`",
        "input": _words(takes),
        "preprocessing": ", ".join(f"`{key}`" for key in config["preprocessing"]),
        "mixer": " + ".join(mixers),
        "files": ", ".join(f"`{name}`" for name in config.get("files", {})),
    }
    rows += ["## Facts", "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)]
    return f"---\n{_front_matter(record, info, mixers)}---\n\n" + "\n\n".join(rows) + "\n"


def usage(config: Mapping[str, Any], where: str, *, shipped: bool = False) -> str:
    """The lines of Python of a card; tests run those of every card that ships."""
    from ._registry import model_info

    record = weights_of_config(config, where)
    name = record.name if record is not None else where
    task = model_info(config["name"]).task
    if shipped:
        load = f'model = seqzoo.create_model("{name}", pretrained=True).eval()'
    else:
        load = f'model = seqzoo.load_model("{where}")'
    own = record.usage.splitlines() if record is not None and record.usage else None
    generates = task == "text" and record is not None and record.input.get("causal")
    if own is not None:
        lines: Sequence[str] = own
    elif task == "text" and generates and record is not None and record.input.get("vocab_size") == 256:
        lines = _USAGE["text"]
    elif task == "forecasting":
        lines = _USAGE["forecasting"]
    elif task in ("documents", "audio_classify") and "labels" in config["preprocessing"]:
        lines = _USAGE["labels"]
    else:
        lines = _GENERAL
    return "\n".join(["import seqzoo", "", load, *lines])


def _front_matter(record: Weights | None, info: Any, mixers: Sequence[str]) -> str:
    """YAML; strings as JSON writes them, which YAML reads."""
    metrics = {} if record is None else record.metrics
    fields: list[str] = ["library_name: seqzoo"]
    if record is not None and record.license:
        fields.append(f"license: {json.dumps(record.license)}")
    if info.task in _PIPELINE_TAGS:
        fields.append(f"pipeline_tag: {_PIPELINE_TAGS[info.task]}")
    tags = dict.fromkeys(["seqzoo", info.modality, info.task, *mixers])
    fields += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags if tag)]
    if record is not None and record.data:
        fields += ["datasets:", f"- {json.dumps(record.data)}"]
    if metrics:
        fields += ["metrics:", *(f"- {json.dumps(name)}" for name in metrics)]
    if record is not None and metrics:
        fields += [
            "model-index:",
            f"- name: {json.dumps(record.name)}",
            "  results:",
            "  - task:",
            f"      type: {json.dumps(_PIPELINE_TAGS.get(info.task, info.task))}",
            "    dataset:",
            f"      name: {json.dumps(record.data)}",
            f"      type: {json.dumps(record.data)}",
            "    metrics:",
        ]
        for name, value in metrics.items():
            fields += [f"    - type: {json.dumps(name)}", f"      value: {value!r}"]
    if record is not None and record.command:
        fields.append(f"training_command: {json.dumps(record.command)}")
    return "".join(f"{field}\n" for field in fields)


def _results(record: Weights) -> str:
    """The table of the model and its baselines; which way is better stands below."""
    columns = list(dict.fromkeys(key for row in record.results for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in record.results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if not record.metric:
        return table
    way = "lower" if LOWER_IS_BETTER.search(record.metric) else "higher"
    what = f"The model stands in the first row, baselines below it. What decides is {record.metric}; {way} is better."
    return f"{table}\n\n{what}"


def _made(record: Weights) -> str:
    facts = [f"Trained on {record.data}" + (f" ({record.data_license})" if record.data_license else "")]
    facts += [f"{key} {value}" for key, value in record.environment.items() if value]
    return "; ".join(facts) + "."


def _words(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(v) if not isinstance(v, str) else v}" for key, v in value.items())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _link(paper: str) -> str:
    kind, _, number = paper.partition(":")
    return f"[{paper}](https://arxiv.org/abs/{number})" if kind == "arXiv" else paper or "no paper"


def card_texts() -> dict[str, str]:
    """The card of everything that ships, by file name."""
    home = weights_folder()
    texts = {}
    for record in known_weights().values():
        folder = Path(record.source)
        if folder.parent == home:
            texts[f"{record.name}.md"] = model_card(read_config(folder), record.name, shipped=True)
    return texts


def write_cards(folder: str | Path) -> list[Path]:
    """Write the card of everything that ships into a folder, and take away those of what does not."""
    folder, texts = Path(folder), card_texts()
    for path in folder.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def stale_cards(folder: str | Path) -> list[str]:
    """Names of cards that are missing, left over, or not what `write_cards` would write."""
    folder, texts = Path(folder), card_texts()
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in {*found, *texts} if found.get(name) != texts.get(name))
