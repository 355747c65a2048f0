"""Running fit, validate, test and predict: Hydra composes, `run.execute` does the work.

- One job: a Hydra application. Processes that Lightning starts beside it for DDP get the same command line
  and SEQZOO_RUN_DIR, and compose in place, so that there is one run folder.
- A sweep (`-m`): one fresh process per job, because a second job in the same process finds the first one's
  process group and GPU memory.
- Ranks started from outside (torchrun, srun): all of them come here at once and derive one run folder from
  the job's id; rank 0 writes it.

No change of directory; everything is written below the run folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import stopping
from .atomic import atomic_write_text
from .config_errors import explain
from .environment import CWD, RANK_VARIABLES, RUN_DIR, environment_kept, external_rank, variable
from .errors import UserError, one_line
from .hydra_guard import guarded_composing
from .overrides import Request, command_line_targets, complete_mixer, quote, split_override
from .validate import check_mixer_is_read, validate_types

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_FULL_ERROR = "HYDRA_FULL_ERROR"


def launch(request: Request) -> int:
    """Run a command line; returns the exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted by Ctrl-C, 143 by
    SIGTERM, 129 by SIGHUP."""
    wants_traceback = os.environ.get(_FULL_ERROR) == "1"
    with environment_kept(), stopping.handled(), guarded_composing(request.overrides):
        os.environ[CWD] = os.getcwd()  # ${paths.data} and ${paths.runs} start from it
        if request.allow:
            os.environ["SEQZOO_ALLOW"] = ",".join(filter(None, [os.environ.get("SEQZOO_ALLOW"), *request.allow]))
        overrides = list(request.overrides)
        try:
            overrides = [*complete_mixer(overrides), *_search_path(request)]
            if RUN_DIR in os.environ:
                return _composed(request, overrides, Path(os.environ[RUN_DIR]), wants_traceback)
            rank, job = external_rank()
            if job is not None:
                if request.sweep:
                    raise UserError("a sweep (-m) starts its own processes: run it without torchrun or srun")
                if not any(split_override(o)[1] == "hydra.run.dir" for o in overrides):
                    overrides.append(f"hydra.run.dir='${{paths.runs}}/${{task.name}}/{job}'")
                if rank != 0:
                    return _composed(request, overrides, None, wants_traceback)
            return _hydra(request, overrides, wants_traceback)
        except KeyboardInterrupt as error:
            print(_how(error), file=sys.stderr)
            return _status(error)
        except UserError as error:
            return _say(str(error), USAGE, wants_traceback)
        except Exception as error:
            # Only composing gets here: what a run raises was dealt with where its run folder is known.
            return _say(explain(error, overrides, request.config_dirs), USAGE, wants_traceback)


# Composing --------------------------------------------------------------------------------------------------


def _search_path(request: Request) -> list[str]:
    """The user's config folders as Hydra's search path, below the package's own files."""
    if not request.config_dirs or any(split_override(o)[1] == "hydra.searchpath" for o in request.overrides):
        return []
    return [f"hydra.searchpath=[{','.join(quote(f'file://{folder}') for folder in request.config_dirs)}]"]


def _repeated(request: Request, overrides: Sequence[str]) -> list[str]:
    """The words after the command for a process that is to compose the same config."""
    paths = [o for o in request.overrides if split_override(o)[1] == "hydra.searchpath"]
    folders = [] if paths else [word for folder in request.config_dirs for word in ("--config-dir", folder)]
    return [*overrides, *paths, *folders]


def _hydra(request: Request, overrides: Sequence[str], wants_traceback: bool) -> int:
    """The command line as a Hydra application: a single job, a sweep, --cfg or --info."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    statuses: list[int] = []
    jobs: list[dict[str, Any]] = []

    def task(cfg: Any) -> Any:
        conf = HydraConfig.get()
        run_dir = Path(conf.runtime.output_dir).absolute()
        job_overrides = _as_typed(conf.overrides.task)
        with variable(_FULL_ERROR, "1" if wants_traceback else None):
            if conf.mode == RunMode.MULTIRUN:
                status, objective = _sweep_job(request, job_overrides, run_dir)
                statuses.append(status)
                jobs.append(
                    {
                        "job": conf.job.num,
                        "status": {OK: "ok"}.get(status, f"failed ({status})"),
                        "objective": objective,
                        "overrides": " ".join(job_overrides),
                        "folder": str(run_dir),
                    }
                )
                if stopping.asked() is not None:
                    raise stopping.Stopped(stopping.asked() or 0)
                if status == INTERRUPTED:
                    raise KeyboardInterrupt
                # Sweepers that optimise (Optuna) read NaN as a failed trial.
                return float("nan") if status else objective
            choices = dict(conf.runtime.choices)
            statuses.append(_job(request, cfg, job_overrides, choices, run_dir, wants_traceback))
        return None

    saved = list(sys.argv)
    sys.argv[:] = [saved[0], *overrides, *request.flags]
    handlers = list(logging.getLogger().handlers)
    try:
        # With this variable Hydra raises its errors instead of printing them over several lines and exiting.
        with variable(_FULL_ERROR, "1"):
            hydra.main(version_base="1.3", config_path="pkg://seqzoo.conf", config_name="config")(task)()
    finally:
        sys.argv[:] = saved
        _restore_handlers(handlers)
        if jobs:
            _print_jobs(jobs)
    return OK if not any(statuses) else statuses[0] if len(statuses) == 1 else FAILED


def _restore_handlers(before: list[logging.Handler]) -> None:
    """Take away the handlers that Hydra set up: the folder of run.log may be gone when the process logs again."""
    root = logging.getLogger()
    for handler in set(root.handlers) - set(before):
        handler.close()
    root.handlers[:] = before


def _as_typed(overrides: Any) -> list[str]:
    """Hydra's list of overrides as text: `a=${b}` is to be resolved in the config, not in the list."""
    from omegaconf import OmegaConf

    return [str(o) for o in OmegaConf.to_container(overrides, resolve=False) or ()]


def _composed(request: Request, overrides: Sequence[str], run_dir: Path | None, wants_traceback: bool) -> int:
    """A rank beside rank 0: the same config without Hydra's folders, sweeps and logging.

    run_dir: the folder that rank 0 made; None to take it from the config.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    if request.sweep:
        raise UserError(f"a sweep (-m) cannot run inside a run: unset {RUN_DIR}")
    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
        config = HydraConfig.instance()
        previous, config.cfg = config.cfg, None
        try:
            config.set_config(cfg)  # for ${hydra:runtime.cwd}
            run_dir = Path(run_dir or cfg.hydra.run.dir).absolute()
            choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                hydra_node = cfg.pop("hydra")
            task_overrides = _as_typed(hydra_node.overrides.task)
            plain = _plain(cfg, task_overrides, choices, request.config_dirs)
        finally:
            config.cfg = previous
    run_dir.mkdir(parents=True, exist_ok=True)  # a rank started from outside may be here before rank 0
    return _guarded(lambda: _execute(request.command, plain, run_dir), run_dir, wants_traceback)[0]


def _plain(
    cfg: Any, overrides: Sequence[str], choices: Mapping[str, str | None], config_dirs: Sequence[str]
) -> dict[str, Any]:
    """The config as plain containers, checked for missing values, dangling ${...} and wrong types.

    Raises UserError. The key `command_line_targets` is added.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = [k for k in sorted(OmegaConf.missing_keys(cfg)) if not k.startswith("model.mixer")]
        if missing:
            raise UserError(f"{missing[0]} has no value: give {missing[0]}=...")
        model = OmegaConf.to_container(cfg.get("model") or OmegaConf.create(), resolve=False)
        check_mixer_is_read(dict(model), overrides)  # type: ignore[arg-type]
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{str(error).splitlines()[0]}") from error
    if not isinstance(plain, dict):
        raise UserError(f"the config must be a section of keys, got {type(plain).__name__}")
    result = {str(key): value for key, value in plain.items()}
    validate_types(result, choices, config_dirs)
    return {**result, "command_line_targets": command_line_targets(overrides)}


# Running ----------------------------------------------------------------------------------------------------


def _execute(command: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    from .run import execute

    # Lightning writes to its own handler and to ours; one line each is enough.
    if logging.getLogger().hasHandlers():
        logging.getLogger("lightning").handlers.clear()
    return execute(command, cfg, run_dir)


def _job(
    request: Request,
    cfg: Any,
    overrides: Sequence[str],
    choices: Mapping[str, str | None],
    run_dir: Path,
    wants_traceback: bool,
) -> int:
    """One job in this process, its config saved beside its results."""
    import yaml

    def action() -> None:
        plain = _plain(cfg, overrides, choices, request.config_dirs)
        run_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        line = " ".join([request.command, *overrides]).encode("utf-8", "backslashreplace").decode()
        # predict and test may be given the folder of a fit: its config stays as it was.
        name = "config.yaml" if request.command == "fit" else f"config-{request.command}.yaml"
        atomic_write_text(run_dir / name, f"# seqzoo {line}\n{text}")
        with _as_plain_process(request, _repeated(request, overrides), run_dir):
            _execute(request.command, plain, run_dir)

    status, _ = _guarded(action, run_dir, wants_traceback)
    if status == USAGE:
        _remove_unused(run_dir)
    return status


def _guarded(action: Callable[[], Any], run_dir: Path, wants_traceback: bool) -> tuple[int, Any]:
    """Run and turn what is raised into a line on stderr and an exit status."""
    try:
        return OK, action()
    except KeyboardInterrupt as error:
        return _interrupted(run_dir, error), None
    except SystemExit as error:
        # Lightning turns Ctrl-C into sys.exit(1) once it has shut down, SIGTERM into an exit of its own.
        cause = error.__context__
        if isinstance(cause, KeyboardInterrupt):
            return _interrupted(run_dir, cause), None
        if type(error).__name__ == "SIGTERMException":
            return _interrupted(run_dir, stopping.Stopped(signal.SIGTERM)), None
        return (error.code if isinstance(error.code, int) else FAILED if error.code else OK), None
    except UserError as error:
        return _say(str(error), USAGE, wants_traceback), None
    except Exception as error:
        signum = stopping.asked()
        if signum is not None:  # it ended workers too, whose end is an error
            return _interrupted(run_dir, stopping.Stopped(signum)), None
        message = one_line(error) or "no message"
        hint = "" if wants_traceback else f" (set {_FULL_ERROR}=1 for the traceback)"
        text = f"{type(error).__name__}: {message}{hint}"
        return _say(text, FAILED, wants_traceback), None


def _say(text: str, status: int, wants_traceback: bool) -> int:
    if wants_traceback:
        traceback.print_exc()
    rank = os.environ.get("LOCAL_RANK", "0")
    print(f"error{'' if rank == '0' else f' (rank {rank})'}: {one_line(text)}", file=sys.stderr)
    return status


def _how(error: KeyboardInterrupt) -> str:
    signum = error.signum if isinstance(error, stopping.Stopped) else signal.SIGINT
    return "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"


def _status(error: KeyboardInterrupt) -> int:
    return stopping.exit_status(error.signum) if isinstance(error, stopping.Stopped) else INTERRUPTED


def _interrupted(run_dir: Path, error: KeyboardInterrupt) -> int:
    """Say where training can go on from."""
    found = sorted(run_dir.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if found:
            print(f"{_how(error)}; the last checkpoint: ckpt_path={found[-1]} goes on from it", file=sys.stderr)
        else:
            print(f"{_how(error)} before the first checkpoint", file=sys.stderr)
    return _status(error)


def _remove_unused(run_dir: Path) -> None:
    """Wrong input leaves no run folder behind, unless something other than our own first files is in it."""
    ours = {"config.yaml", "config-validate.yaml", "config-test.yaml", "config-predict.yaml", "run.log"}
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} <= ours:
            for path in run_dir.iterdir():
                path.unlink()
            run_dir.rmdir()


@contextlib.contextmanager
def _as_plain_process(request: Request, arguments: Sequence[str], run_dir: Path) -> Iterator[None]:
    """Let Lightning re-launch this command line for the other ranks, without Hydra's part in it.

    Lightning repeats sys.argv, and where HydraConfig is set adds overrides of its own that start a second
    Hydra application per rank; so the command word is put back, HydraConfig hidden, and the run folder handed
    on.
    """
    from hydra.core.hydra_config import HydraConfig

    config = HydraConfig.instance()
    saved_argv, saved_cfg = list(sys.argv), config.cfg
    sys.argv[:] = [os.path.abspath(saved_argv[0]), request.command, *arguments]
    config.cfg = None
    try:
        with variable(RUN_DIR, str(run_dir)):
            yield
    finally:
        sys.argv[:] = saved_argv
        config.cfg = saved_cfg


# Sweeps -----------------------------------------------------------------------------------------------------


def _sweep_job(request: Request, overrides: Sequence[str], run_dir: Path) -> tuple[int, float | None]:
    """One job of a sweep in a fresh process: (exit status, `objective` of its metrics.json or None)."""
    environment = {k: v for k, v in os.environ.items() if k not in (*RANK_VARIABLES, RUN_DIR)}
    arguments = [*_repeated(request, overrides), f"hydra.run.dir={quote(str(run_dir))}"]
    print(f"job {run_dir.name}: {' '.join(overrides)}", file=sys.stderr, flush=True)
    # -P: the folder where the command runs must not shadow installed modules.
    process = subprocess.Popen([sys.executable, "-P", "-m", "seqzoo", request.command, *arguments], env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt as error:
        # A terminal sends Ctrl-C to the job too; SIGTERM is sent on. It saves its checkpoint; a second one ends it.
        if _status(error) != INTERRUPTED:
            process.send_signal(_status(error) - 128)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
        status = _status(error)
    if status:
        return status, None
    try:
        objective = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8")).get("objective")
    except (OSError, ValueError, AttributeError):
        objective = None
    return status, float(objective) if isinstance(objective, (int, float)) else None


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    from .results import print_table

    print_table(jobs, ["job", "status", "objective", "overrides", "folder"], "jobs of the sweep")
