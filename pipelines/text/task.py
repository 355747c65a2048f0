"""What the command does for text: build, check, report and generate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ..atomic import atomic_write_text
from ..checkpoints import check_same_run, saved_parameters
from ..context_parallel import is_context_parallel
from ..errors import UserError, nearest
from ..nets import mixer_class
from ..results import print_table, write_csv, write_metrics
from .data import PROTOCOLS, TextData
from .module import LanguageModule, constant_state
from .probing import check_probe, draw_probes, run_probes

Data = TextData
SHARES_SEQUENCES = True
_NAMES = {
    "rows": "rows of {0}, each from nothing",
    "sliding": "windows of {0}, {1} apart",
    "carried": "state carried over documents",
}


def build_data(cfg: dict[str, Any]) -> TextData:
    """The data module of a config."""
    wanted = cfg["task"]["test_protocols"]
    for name in () if wanted == "auto" else wanted:
        if name not in PROTOCOLS:
            raise UserError(f"task.test_protocols has {name!r}.{nearest(name, [*PROTOCOLS, 'auto'])}")
    for name in cfg["task"]["probes"]:
        check_probe(name)
    if cfg["task"]["probes"] and cfg["task"]["objective"] != "next":
        raise UserError("task.probes asks for continuations: it needs task.objective=next")
    if cfg["data"].get("whole_rows") and cfg["task"]["carry_state"]:
        raise UserError("data.whole_rows=true does not go with task.carry_state=true, which reads documents to the end")
    data = TextData(**cfg["data"], seed=cfg["seed"])
    data.shared = is_context_parallel(cfg)
    data.carry_state, data.wanted, data.tested = cfg["task"]["carry_state"], wanted, bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: TextData) -> LanguageModule:
    """The module of a config, for the tokenizer of the data."""
    model = dict(cfg["model"])
    return LanguageModule(
        model, cfg["task"], cfg["optimizer"], cfg["scheduler"], data.schema(), mixer_class=mixer_class(model, cfg)
    )


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> LanguageModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of text."""
    saved = saved_parameters(checkpoint, "text", path)
    module = LanguageModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def check_resume(checkpoint: dict[str, Any], module: LanguageModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    own = dict(module.hparams)
    check_same_run(checkpoint, own, path, ("model", "task"))
    saved = checkpoint.get("hyper_parameters", {})
    _compare_schema(saved.get("schema", {}), own["schema"], path, ("tokenizer_key", "seq_len", "corpus"))


def check_schema(module: LanguageModule, data: TextData, path: Path) -> None:
    """Raise UserError when the data's tokenizer is not the one the checkpoint was trained with."""
    _compare_schema(module.schema, data.schema(), path, ("tokenizer_key",))


def _compare_schema(saved: dict[str, Any], own: dict[str, Any], path: Path, keys: tuple[str, ...]) -> None:
    for key in keys:
        if saved.get(key) != own[key]:
            name = {"tokenizer_key": "tokenizer", "corpus": "path"}.get(key, key)
            raise UserError(f"{path} was trained with data.{name}={saved.get(key)!r}, here it is {own[key]!r}")


def prepare_test(module: LanguageModule, data: TextData) -> None:
    """Choose how the test documents are read: each row from nothing, and with as much context as the model can have."""
    wanted = data.wanted
    if module.task["objective"] == "masked":
        data.protocols = ("rows",)
    elif wanted == "auto":
        data.protocols = ("rows", "carried" if constant_state(module.net) else "sliding")
    else:
        if "carried" in wanted and not constant_state(module.net):
            raise UserError("task.test_protocols has 'carried', but this model has no state of constant size")
        data.protocols = tuple(wanted)


def report(trainer: Any, module: LanguageModule, data: TextData, run_dir: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Print and write bits per byte beside general compressors, and the loss by position."""
    number, predictions = data.size("test")
    scores = {name: sums.compute(number, predictions) for name, sums in module.test_sums.items()}
    model = module.hparams["model"]["name"]
    rows = []
    for protocol, score in scores.items():
        how = _NAMES[protocol].format(data.seq_len, data.eval_stride)
        rows.append(
            {
                "method": f"{model}: {how}",
                "bits per byte": score["bits_per_byte"],
                "perplexity": score["perplexity"],
                "loss": score["loss"],
            }
        )
    if module.task["objective"] == "next":
        rows += [{"method": name, "bits per byte": value} for name, value in data.compressors().items()]
    print_table(rows, title=f"test: {data.schema()['corpus']}, {number:,} bytes")
    by_position = [
        {"protocol": name, **row, "bits_per_token": row["bits_per_token"]}
        for name, score in scores.items()
        for row in score["by_position"]
    ]
    write_csv(run_dir / "test.csv", rows)
    write_csv(run_dir / "test_by_position.csv", by_position)
    write_metrics(run_dir, {"test": scores}, name="scores")
    _draw(scores, run_dir)
    probed = _probe(module, data, cfg, run_dir)
    best = min(score["bits_per_byte"] for score in scores.values())
    print(f"tables and pictures in {run_dir}", flush=True)
    found = {"test/bits_per_byte": best, "test": {row["method"]: row["bits per byte"] for row in rows}}
    return {**found, "probes": probed} if probed else found


def _probe(module: LanguageModule, data: TextData, cfg: dict[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """The long-context probes of `task.probes`: a table, a file and heat maps."""
    task = cfg["task"]
    if not task["probes"]:
        return []
    options = {"samples": task["probe_samples"], "seed": cfg["seed"]}
    rows = run_probes(module.net, data.tokenizer, task["probes"], task["probe_lengths"], **options)
    print_table(rows, title="probes: share of right answers (of texts) and right tokens (of token tasks)")
    write_csv(run_dir / "probes.csv", rows)
    draw_probes(rows, run_dir / "probes.png")
    return rows


def _draw(scores: dict[str, Any], run_dir: Path) -> None:
    from ..pictures import plot_curves

    curves = {}
    for name, score in scores.items():
        rows = [r for r in score["by_position"] if r["tokens"] >= 100]
        # the middle of each range of positions, on a scale of powers of two
        curves[name] = (
            [math.sqrt(max(r["from"], 1) * max(r["to"], 1)) for r in rows],
            [r["bits_per_token"] for r in rows],
        )
    plot_curves(
        curves,
        run_dir / "loss_by_position.png",
        title="loss by position in the document",
        xlabel="tokens before it in the document",
        ylabel="bits per token",
        log_x=True,
    )


@torch.no_grad()
def predict(trainer: Any, module: LanguageModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Continue `task.prompt` token by token, on the terminal and into generated.jsonl."""
    from .predict import continue_prompts

    records = continue_prompts(module, cfg["task"], seed=cfg["seed"])
    output = Path(cfg.get("output") or run_dir / "generated.jsonl")
    atomic_write_text(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    print(f"\n{len(records)} continuation(s) in {output}", flush=True)
    return {"tokens": sum(r["tokens"] for r in records)}
