# SPDX-License-Identifier: Apache-2.0
"""Whose folder it is: runs compared by meaning, what is finished, and one process at a time."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest

from k3jax.config import ModelConfig, to_dict
from k3jax.training.run_folder import RunFolder
from k3jax.training.train_config import (
    CheckpointConfig,
    LoraConfig,
    PriorConfig,
    TrainConfig,
)


CONFIG = TrainConfig(sample_prompts=("a", "b"), lora=LoraConfig())


def description(config=CONFIG, model=ModelConfig(), base="f" * 64):  # noqa: B008  frozen
    return {"train": to_dict(config), "model": to_dict(model), "base": base}


def changed(config=CONFIG, data=None, optimizer=None, **fields):
    groups = {
        "data": dataclasses.replace(config.data, **(data or {})),
        "optimizer": dataclasses.replace(config.optimizer, **(optimizer or {})),
    }
    return dataclasses.replace(config, **{**groups, **fields})


@pytest.fixture
def folder(tmp_path):
    """A run that has made a checkpoint at step 5."""
    folder = RunFolder(tmp_path / "run")
    folder.record(description())
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    return folder


def edit(folder, change):
    path = folder.path / "run.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_same_run_goes_on(folder):
    folder.check(description())
    other = changed(
        steps=7,
        log_every=1,
        sample_every=5,
        sample_prompts=("c",),
        output="elsewhere",
        checkpoint=CheckpointConfig(every=3, keep_best=0),
        data={"num_workers": 3},
    )
    folder.check(description(other))
    assert json.loads((folder.path / "run.json").read_text())["train"]["steps"] == 10_000
    folder.record(description(other))
    assert json.loads((folder.path / "run.json").read_text())["train"]["steps"] == 7


def test_another_run_does_not(folder):
    other = changed(
        steps=20, batch_size=8, optimizer={"learning_rate": 3e-4}, lora=None, log_every=2
    )
    with pytest.raises(ValueError, match="holds another run") as error:
        folder.check(description(other))
    message = str(error.value)
    assert "train.batch_size is 8 and was 32" in message
    assert "train.optimizer.learning_rate is 0.0003 and was 0.0001" in message
    assert "train.lora.rank" in message and "train.lora.targets" in message
    for unchanged in ("seed", "steps", "checkpoint", "log_every"):
        assert f"{unchanged} is" not in message
    model = dataclasses.replace(ModelConfig(), sample_size=64)
    with pytest.raises(ValueError, match=r"model.sample_size is 64 and was 1024"):
        folder.check(description(model=model))
    with pytest.raises(ValueError, match=r'base is "0" and was "ffff'):
        folder.check(description(base="0"))


def test_a_folder_where_nothing_was_made_is_free(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check(description())
    folder.record(description())
    folder.check(description(changed(batch_size=8)))
    for name in ("checkpoints/1", "checkpoint", "lora"):
        made = tmp_path / "run" / name
        made.mkdir(parents=True)
        with pytest.raises(ValueError, match="batch_size is 8 and was 32"):
            folder.check(description(changed(batch_size=8)))
        made.rmdir()


def test_paths_are_compared_by_the_files_they_lead_to(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    spellings = ["pictures", "./pictures/", "link", str(tmp_path / "pictures"), "x/../pictures"]
    for first in spellings:
        folder = RunFolder(tmp_path / "run")
        folder.record(description(changed(data={"path": first}, prior=PriorConfig(first))))
        (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True, exist_ok=True)
        for path in spellings:
            folder.check(description(changed(data={"path": path}, prior=PriorConfig(path))))
        monkeypatch.chdir("/")  # what is recorded does not hang on where the command was given
        folder.check(
            description(
                changed(data={"path": f"{tmp_path}/link"}, prior=PriorConfig(f"{tmp_path}/link"))
            )
        )
        monkeypatch.chdir(tmp_path)
    folder.record(description(changed(data={"path": "a/*.tar, b/*.tar"})))
    folder.check(description(changed(data={"path": "./a/*.tar,b//*.tar"})))
    with pytest.raises(ValueError, match=r"train\.data\.path is .*other.* and was"):
        folder.check(description(changed(data={"path": "other"})))


def test_runs_of_older_versions_are_read(folder):
    """Relative paths, and fields that came later, which have their defaults."""

    def older(content):
        for group, name in (("loss", "timesteps"), ("data", "crop"), ("optimizer", "eps")):
            del content["train"][group][name]
        del content["train"]["masks"], content["train"]["decoder_only"]
        del content["model"]["sampler"]["eta"], content["train"]["lora"]["alpha"]

    edit(folder, older)
    folder.check(description())
    with pytest.raises(
        ValueError, match=r"another run \(train.loss.timesteps is \[0, 9\] and was \[0"
    ):
        config = changed(loss=dataclasses.replace(CONFIG.loss, timesteps=(0, 9)))
        folder.check(description(config))
    edit(folder, lambda content: content["train"].update(came_later=3))
    with pytest.raises(ValueError, match=r"train.came_later is not given and was 3"):
        folder.check(description())


def test_equal_numbers_are_equal(folder):
    def spelled(content):
        content["train"]["batch_size"] = 32.0
        content["train"]["optimizer"]["max_grad_norm"] = 1
        content["model"]["sampler"]["beta_end"] = float("nan")

    edit(folder, spelled)
    again = description()
    again["model"]["sampler"]["beta_end"] = float("nan")
    folder.check(again)
    with pytest.raises(ValueError, match=r"beta_end is 0.012 and was NaN"):
        folder.check(description())


def test_where_the_cache_is_means_nothing(folder):
    folder.record(description(changed(data={"cache": "here"})))
    folder.check(description(changed(data={"cache": "there"})))
    with pytest.raises(ValueError, match=r"train.data.cache is false and was true"):
        folder.check(description())


def test_more_steps_but_not_of_a_cosine_and_not_fewer(folder):
    folder.check(description(changed(steps=20_000)))
    folder.check(description(changed(steps=5)))
    with pytest.raises(ValueError, match=r"has 5 steps, and train.steps is 4: give --steps 5"):
        folder.check(description(changed(steps=4)))
    cosine = changed(optimizer={"schedule": "cosine"})
    folder.record(description(cosine))
    folder.check(description(cosine))
    with pytest.raises(ValueError, match=r"steps is 20000 and was 10000, on which every learning"):
        folder.check(description(dataclasses.replace(cosine, steps=20_000)))


def test_what_is_finished(folder):
    assert folder.finished(5) is None
    folder.record_result(5, folder.path / "lora")
    assert folder.finished(5) is None, "the result is gone: it is made again"
    (folder.path / "lora").mkdir()
    assert folder.finished(5) == folder.path / "lora"
    assert folder.finished(6) is None
    folder.check(description(changed(steps=6)))
    (folder.path / "checkpoints" / "5").rmdir()  # people tidy up
    assert folder.finished(5) == folder.path / "lora"
    with pytest.raises(ValueError, match=r"has 5 steps"):
        folder.check(description(changed(steps=4)))
    for damaged in ("", "{}", "[]"):
        (folder.path / "result.json").write_text(damaged)
        assert folder.finished(5) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train": 3}'])
def test_a_damaged_run_json_is_named(folder, content):
    (folder.path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json cannot be read .* or delete that file"):
        folder.check(description())


def test_a_bucket_is_refused():
    with pytest.raises(ValueError, match="gs://bucket/run, which is no local folder"):
        RunFolder("gs://bucket/run")


HOLDER = """
    import os, sys
    from k3jax.training.run_folder import RunFolder

    with RunFolder(sys.argv[1]).lock():
        print("locked", flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_one_process_at_a_time_and_the_dead_hold_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder.path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=rf"another process is training in {folder.path} now"):
        folder.lock().__enter__()
    holder.kill()
    holder.wait()
    with folder.lock():
        second = subprocess.run(command, input="", capture_output=True, env=environment, text=True)
    assert second.returncode == 1 and "another process is training" in second.stderr
    with folder.lock():  # given back at the end
        pass
