"""Saved models on the hub: download with a pinned revision, a local cache, offline mode; upload."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ._cards import model_card
from ._files import CARD, CONFIG, WEIGHTS, is_full_disk, read_config, write_text
from ._saving import save_model

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """("org/name", revision or None) of "org/name@revision"; None for what is no such name."""
    found = _HUB_ID.fullmatch(text)
    if found is None or ".." in text or "--" in found[1]:
        return None
    return found[1], found[2]


def cache_folder(cache_dir: str | Path | None = None) -> Path | None:
    """Where downloads are kept: as given, else SEQZOO_CACHE, else None: the hub's own cache (HF_HOME)."""
    chosen = cache_dir or os.environ.get("SEQZOO_CACHE")
    return Path(chosen).expanduser() if chosen else None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that the network is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def download(repo: str, revision: str | None = None, *, cache_dir: str | Path | None = None) -> Path:
    """The folder of a saved model of the hub, from the cache where it is there already.

    revision: a branch, tag or commit; all files are of one commit. Raises ValueError for a model or revision that is
    not there, no network, a full disk, and offline for what the cache lacks, each with the way out; ImportError without
    huggingface_hub.
    """
    cache = cache_folder(cache_dir)
    with _explained(repo, revision, cache):
        config = Path(_fetch(repo, CONFIG, revision, cache))
        # .../snapshots/<commit>/config.json: a branch may move between two files
        commit = config.parent.name if config.parent.parent.name == "snapshots" else revision
        names = [WEIGHTS, *read_config(config.parent)["files"]]
        for name in names:
            _fetch(repo, name, commit, cache)
    return config.parent


def _fetch(repo: str, name: str, revision: str | None, cache: Path | None) -> str:
    hub = _library()
    place = None if cache is None else str(cache)
    return hub.hf_hub_download(
        repo, name, revision=revision, cache_dir=place, local_files_only=is_offline(), library_name="seqzoo"
    )


@contextmanager
def _explained(repo: str, revision: str | None, cache: Path | None) -> Iterator[None]:
    """What can go wrong with a download, as one message with the way out."""
    hub = _library()
    errors = hub.errors
    root = Path(hub.constants.HF_HUB_CACHE) if cache is None else cache
    folder = root / f"models--{repo.replace('/', '--')}"
    before = set(folder.rglob("*.incomplete"))
    what = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"the hub's {repo} has no revision {revision!r}") from error
    except errors.GatedRepoError as error:
        raise ValueError(f"{what} asks for an agreement on its page, and for a token: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no model {repo!r}, or it is private (hf auth login)") from error
    except errors.LocalEntryNotFoundError as error:
        cause = "offline (HF_HUB_OFFLINE) and not" if is_offline() else "the hub cannot be reached, and it is not"
        raise ValueError(_no_network(what, f"{cause} in the cache {root}")) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{what} is no saved model of seqzoo: {str(error).splitlines()[0]}") from error
    except ValueError:
        raise
    except Exception as error:
        if _full(error):
            for path in set(folder.rglob("*.incomplete")) - before:
                path.unlink(missing_ok=True)
            raise ValueError(
                f"no space left in the cache {root} for {what}; nothing half-written is kept. Make room, or give "
                "another disk: cache_dir=..., or the variable SEQZOO_CACHE"
            ) from error
        if isinstance(error, (OSError, hub.errors.HfHubHTTPError)) or type(error).__module__.startswith("http"):
            raise ValueError(_no_network(what, f"the hub cannot be reached ({_first_line(error)})")) from error
        raise


def _no_network(what: str, why: str) -> str:
    return (
        f"{what}: {why}. Without a network: on a machine that has one, hf download {what.split('@')[0]} --local-dir "
        "FOLDER, then load_model('FOLDER'); list_models(pretrained=True) are the weights that need none"
    )


def _full(error: BaseException | None) -> bool:
    while error is not None:
        if is_full_disk(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a seqzoo model",
    api: Any = None,
    **saving: Any,
) -> str:
    """Upload a model, or a folder that `save_model` wrote, and return the address of the commit.

    repo_id: "org/name", made where it is not there; private: of a new one. revision: the branch. api: an object with
    `create_repo` and `upload_folder` as `huggingface_hub.HfApi` has them; None: that class with `token`. saving:
    arguments of `save_model`. Only the files of a saved model are uploaded, with a card that names the repository.
    Raises ValueError for a folder that is no saved model and for a name that is none.
    """
    found = parse_hub_id(repo_id)
    if found is None or found[1] is not None:
        raise ValueError(f"repo_id={repo_id!r} must be a name such as org/name; a branch is revision=...")
    if saving and not isinstance(model, nn.Module):
        raise ValueError(f"{', '.join(saving)}: a folder is uploaded as it was saved; give the model to save it anew")
    if api is None:
        api = _library().HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if isinstance(model, nn.Module):
            save_model(model, folder, **saving)
        else:
            config = read_config(model)
            for name in (WEIGHTS, CONFIG, *config["files"]):
                (folder / name).symlink_to((Path(model) / name).resolve(strict=True))
        config = read_config(folder)
        write_text(folder / CARD, model_card(config, repo_id))
        api.create_repo(repo_id=repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            commit_message=commit_message,
            allow_patterns=[WEIGHTS, CONFIG, CARD, *config["files"]],
        )
    return str(getattr(commit, "commit_url", commit))


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError("models of the hub need huggingface_hub: pip install 'seqzoo[hub]'") from error
    return huggingface_hub
