"""Checkpoints that survive a full disk, a kill and damage."""

import ctypes
import errno
import logging
import os
import pickle
import re
import sys
import zipfile

import lightning as L
import pytest
import torch
from toy_training import Tiny, loader

from seqzoo.pipelines import checkpoints
from seqzoo.pipelines.checkpoints import AtomicCheckpointIO, CheckpointError, SafeModelCheckpoint, load_checkpoint
from seqzoo.pipelines.errors import UserError


def trainer(tmp_path, *callbacks, epochs=2, **options):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, SafeModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        **options,
    )


def content(size=1000, seed=0):
    return {"state_dict": {"w": torch.randn(size, generator=torch.Generator().manual_seed(seed))}, "epoch": 3}


def test_round_trip(tmp_path):
    io_plugin, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io_plugin.save_checkpoint(content(), path)
    back = io_plugin.load_checkpoint(path)
    assert torch.equal(back["state_dict"]["w"], content()["state_dict"]["w"]) and back["epoch"] == 3
    assert os.listdir(path.parent) == ["last.ckpt"]
    io_plugin.remove_checkpoint(path)
    assert not path.exists()


def full_disk(monkeypatch, after=100):
    """Make every file that the checkpoint writer opens take `after` bytes and no more."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, after

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.file.write(data[: self.left])
            self.left -= written
            return written

    def opened(*arguments, **options):
        return Full(open(*arguments, **options))

    monkeypatch.setattr(checkpoints, "open", opened, raising=False)


def test_full_disk_keeps_the_previous_checkpoint_and_says_how_much_is_needed(tmp_path, monkeypatch):
    io_plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io_plugin.save_checkpoint(content(seed=1), path)
    before = path.read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        io_plugin.save_checkpoint(content(size=500_000, seed=2), path)
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in message
    assert "disk full" in message and str(path) in message and "needs 2.0 MB" in message
    assert re.search(r"[\d.]+ (bytes|kB|MB|GB) are free", message) and "the earlier last.ckpt is kept" in message
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.ckpt"]


def mount_small_disk(folder, size):
    """In this process only: a file system of `size` at `folder`; False where the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mount, user, group = 0x10000000, 0x00020000, os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mount):
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    return libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_full_disk_for_real(tmp_path):
    """A file system of 256 kB: the second checkpoint does not fit."""
    io_plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if not mount_small_disk(tmp_path, "256k"):
                os._exit(77)
            io_plugin.save_checkpoint({"state_dict": {"w": torch.ones(20_000)}}, path)
            try:
                io_plugin.save_checkpoint({"state_dict": {"w": torch.zeros(60_000)}}, path)
            except CheckpointError as error:
                kept = bool((load_checkpoint(path)["state_dict"]["w"] == 1).all())
                good = "disk full" in str(error) and kept and os.listdir(tmp_path) == ["last.ckpt"]
                status = 0 if good else 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 77:
        pytest.skip("mounting is not allowed here")
    assert status == 0


def test_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("size", [0, 10, 1000, -20])
def test_truncated_checkpoint(tmp_path, size):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    data = path.read_bytes()
    path.write_bytes(data[:size])
    length = len(data[:size])
    with pytest.raises(CheckpointError, match=rf"a\.ckpt is truncated or not a checkpoint \({length} bytes\)"):
        load_checkpoint(path)


def test_one_flipped_byte_is_found(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    with zipfile.ZipFile(path) as archive:
        (record,) = [r for r in archive.infolist() if r.filename.endswith("data/0")]
    data = bytearray(path.read_bytes())
    data[record.header_offset + 400] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch itself does not see it
    with pytest.raises(CheckpointError, match=r"is damaged: the check sum of .*data/0"):
        load_checkpoint(path)


def test_what_is_no_checkpoint_of_ours(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weights": {}}, path)
    with pytest.raises(CheckpointError, match="not a seqzoo checkpoint: no 'state_dict' in it, but weights"):
        load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="but list"):
        load_checkpoint(path)
    torch.save(content(), path)
    with pytest.raises(CheckpointError, match="no 'hyper_parameters' in it"):
        load_checkpoint(path, require=("hyper_parameters",))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not a seqzoo checkpoint"):
        load_checkpoint(path)
    path.write_text("some,csv\n1,2\n")
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"is a folder, not a file; it holds a\.ckpt"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such checkpoint: .*b\.ckpt; .* holds a\.ckpt"):
        load_checkpoint(tmp_path / "b.ckpt")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "x": Evil(tmp_path / "evil")}, path)
    for load in (load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            load(path)
    path.write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def checkpoint_pair(tmp_path):
    best = SafeModelCheckpoint(
        dirpath=tmp_path / "c", filename="best-{epoch}", monitor="val/loss", auto_insert_metric_name=False
    )
    last = SafeModelCheckpoint(dirpath=tmp_path / "c", filename="last", save_top_k=1, monitor=None)
    return best, last


def test_training_outlives_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, caplog):
    """Epoch 2 cannot be saved: epoch 1 stays best, epoch 3 is saved again, the weights are as undisturbed."""

    class DiskFull(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            monkeypatch.undo()
            if trainer.current_epoch == 1:
                full_disk(monkeypatch)

    best, last = checkpoint_pair(tmp_path)
    model = Tiny()
    with caplog.at_level(logging.ERROR, "seqzoo"):
        trainer(tmp_path, DiskFull(), best, last, epochs=3).fit(model, loader(3), loader(1))
    said = [r.getMessage() for r in caplog.records if "disk full" in r.getMessage()]
    assert len(said) == 2 and all("Training goes on" in message and "\n" not in message for message in said)
    assert sorted(os.listdir(tmp_path / "c")) == ["best-2.ckpt", "last.ckpt"]
    assert best.failure is None and last.failure is None
    assert best.best_model_path.endswith("best-2.ckpt") and list(best.best_k_models) == [best.best_model_path]
    saved = load_checkpoint(tmp_path / "c" / "last.ckpt")
    assert saved["epoch"] == 2 and torch.equal(saved["state_dict"]["weight"], model.weight.detach())
    undisturbed = Tiny()
    trainer(tmp_path / "2", epochs=3).fit(undisturbed, loader(3), loader(1))
    assert torch.equal(undisturbed.weight, model.weight)


def test_disk_full_to_the_end_keeps_the_best_so_far_and_reports_it(tmp_path, monkeypatch):
    class DiskFull(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                full_disk(monkeypatch)

    best, last = checkpoint_pair(tmp_path)
    run = trainer(tmp_path, DiskFull(), best, last, epochs=3)
    run.fit(Tiny(), loader(3), loader(1))
    monkeypatch.undo()
    assert "disk full" in best.failure and "disk full" in last.failure
    assert sorted(os.listdir(tmp_path / "c")) == ["best-0.ckpt", "last.ckpt"]
    assert best.best_model_path.endswith("best-0.ckpt") and float(best.best_model_score) == 10.0
    # and the run goes on from there
    again = Tiny()
    best, last = checkpoint_pair(tmp_path)
    run = trainer(tmp_path, best, last, epochs=3)
    run.fit(again, loader(3), loader(1), ckpt_path=tmp_path / "c" / "last.ckpt")
    undisturbed = Tiny()
    trainer(tmp_path / "2", epochs=3).fit(undisturbed, loader(3), loader(1))
    assert torch.equal(again.weight, undisturbed.weight)


def test_full_disk_while_saving_after_an_error_does_not_hide_the_error(tmp_path, monkeypatch, caplog):
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                full_disk(monkeypatch)
                raise RuntimeError("the real reason")
            return super().training_step(batch, batch_idx)

    saver = SafeModelCheckpoint(dirpath=tmp_path / "c", save_on_exception=True)
    with pytest.raises(RuntimeError, match="the real reason"):
        trainer(tmp_path, saver, epochs=1).fit(Failing(), loader(3))
    assert "disk full" in saver.failure


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    for name in (".last.ckpt-a8f3.tmp", "my.tmp", ".hidden", "old.ckpt"):
        (folder / name).write_text("x")
    best, _ = checkpoint_pair(tmp_path)
    trainer(tmp_path, best, epochs=1).fit(Tiny(), loader(1), loader(1))
    assert sorted(os.listdir(folder)) == [".hidden", "best-0.ckpt", "my.tmp", "old.ckpt"]
