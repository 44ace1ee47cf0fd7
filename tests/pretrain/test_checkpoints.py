"""Files are whole or absent; what may be resumed, and when files are written."""

import pytest
import torch

from medspark.pretrain.checkpoints import check_resume, find_resume, write_whole


def load(path):
    return torch.load(path, weights_only=True)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "x.bin"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


def test_the_name_appears_when_the_content_is_complete(tmp_path, monkeypatch):
    from medspark.pretrain import checkpoints

    path, seen = tmp_path / "x.bin", []
    replace = checkpoints.os.replace

    def watch(source, target):
        seen.append((source.parent == path.parent, source.read_bytes(), path.exists()))
        replace(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", watch)
    write_whole(path, lambda file: file.write(b"all of it"))
    assert seen == [(True, b"all of it", False)]


def test_auto_takes_the_last_of_the_folder(tmp_path):
    assert find_resume(None, tmp_path) is None
    assert find_resume("auto", tmp_path) is None
    (tmp_path / "last.ckpt").touch()
    assert find_resume("auto", tmp_path) == tmp_path / "last.ckpt"
    assert find_resume("other.ckpt", tmp_path).name == "other.ckpt"
    assert find_resume(None, tmp_path) is None


def test_no_file_in_the_middle_of_a_step(tmp_path, helpers):
    """A resumed run that dies between two batches of its first step leaves the file it came from."""
    for stop in (13, 15):  # in step 3 of 4 samples each, in its first and in its second batch
        train = helpers.Volumes(99, fail_at=stop)
        with pytest.raises(OSError, match="the power went"):
            helpers.run(tmp_path, train, accumulate=2, save_every=1, val_every=6, resume="auto")
        content = load(tmp_path / "checkpoints" / "last.ckpt")
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert (content["global_step"], progress["ready"]) == (3, 6)
    assert train.read == [12, 13, 14]


def test_left_overs_of_killed_writes_are_removed(tmp_path, helpers):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.ckpt.77.tmp").write_bytes(b"half")
    (tmp_path / "panels").mkdir()
    (tmp_path / "panels" / ".step_000002.png.77.tmp").write_bytes(b"half")
    helpers.run(tmp_path, max_steps=2)
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [p.name for p in (tmp_path / "panels").iterdir()] == ["step_000002.png"]


def test_a_complete_run_is_left_as_it_is(finished, tmp_path, helpers):
    folder, result, _ = finished
    before = result.last.read_bytes()
    train = helpers.Volumes(12)
    again = helpers.run(folder, train, resume="auto")
    assert train.read == []
    assert again == result
    assert result.last.read_bytes() == before


def test_the_best_stays_the_best(tmp_path, helpers):
    """The learning rate explodes: validation gets worse, best.ckpt keeps the early weights."""
    optim = {"warmup_steps": 6, "warmup_start": 1e-6}
    result = helpers.run(tmp_path, lr=30.0, val_every=1, optim=optim)
    from medspark.pretrain.summary import read_history

    losses = read_history(tmp_path)["val/loss"]
    best = min(losses, key=lambda step: losses[step])
    assert load(result.best)["global_step"] == best + 1 < 6
    assert load(result.last)["global_step"] == 6


def test_a_run_that_ends_between_validations_is_saved(tmp_path, helpers):
    result = helpers.run(tmp_path, max_steps=5, val_every=2)
    assert load(result.last)["global_step"] == 5
    assert {"train/loss", "val/loss"} <= result.metrics.keys()


def test_checkpoints_name_no_path_of_the_machine(finished):
    folder, result, _ = finished
    assert str(folder).encode() not in result.last.read_bytes()


def test_other_optimiser_settings_are_allowed_and_named(finished, tmp_path):
    path = finished[1].last
    content = load(path)
    settings = dict(content["hyper_parameters"])
    assert check_resume(content, path, settings, 2) == 6
    with pytest.warns(UserWarning, match=r"other optimiser settings: lr 0.003 -> 0.001"):
        check_resume(content, path, {**settings, "optim": {**settings["optim"], "lr": 1e-3}}, 2)
    with pytest.raises(ValueError, match=r"its crop is \[64, 64, 64\], here it is \[32, 32, 32\]"):
        check_resume(content, path, {**settings, "crop": [32, 32, 32]}, 2)


def test_a_damaged_checkpoint_is_told(tmp_path, helpers):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        helpers.run(tmp_path, resume="auto")
