# SPDX-License-Identifier: Apache-2.0
"""Settings that cannot be meant are refused by name, before anything is read or made."""

import dataclasses
import math
from typing import get_args, get_origin, get_type_hints

import pytest

from k3jax.cli.config_files import config_names, load_config
from k3jax.cli.run_config import build, collect
from k3jax.config import LoraConfig
from k3jax.training.train_config import Limit, PriorConfig, TrainConfig, checked
from k3jax.training.training_run import TrainingRun, train


FULL = TrainConfig(lora=LoraConfig(), prior=PriorConfig("class"))


def with_value(config, name, value):
    """A config in which the field of a dotted name has another value."""
    field, _, rest = name.partition(".")
    value = with_value(getattr(config, field), rest, value) if rest else value
    return dataclasses.replace(config, **{field: value})


def numbers(config, prefix=""):
    """Dotted name -> int or float, of the fields that hold one number."""
    found = {}
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = {int, float}.intersection((hint, *get_args(hint)))
        if dataclasses.is_dataclass(value):
            found |= numbers(value, f"{prefix}{name}.")
        elif kinds and get_origin(hint) is not tuple:
            found[f"{prefix}{name}"] = kinds.pop()
    return found


def limits(config, prefix=""):
    """Dotted name -> limits, of the fields that have them."""
    found = {}
    for field in dataclasses.fields(config):
        check, value = field.metadata.get("check"), getattr(config, field.name)
        if isinstance(check, Limit):
            found[f"{prefix}{field.name}"] = check
        elif check is not None:  # of a group that is defined elsewhere
            found |= {f"{prefix}{field.name}.{name}": limit for name, limit in check.items()}
        elif dataclasses.is_dataclass(value):
            found |= limits(value, f"{prefix}{field.name}.")
    return found


KINDS, LIMITS = numbers(FULL), limits(FULL)


def test_every_number_has_a_limit():
    assert KINDS.keys() == LIMITS.keys()


def test_every_setting_has_its_help():
    groups = [FULL, *(group for group in vars(FULL).values() if dataclasses.is_dataclass(group))]
    for group in groups:
        for field in dataclasses.fields(group):
            assert isinstance(group, LoraConfig) or field.metadata["help"], (group, field.name)


@pytest.mark.parametrize("name", LIMITS)
def test_numbers_that_cannot_be_meant(name):
    limit, kind = LIMITS[name], KINDS[name]
    wrong, right = [limit.low - 1], []
    (wrong if limit.open_low else right).append(limit.low)
    if limit.high is not None:
        wrong.append(limit.high + 1)
        (wrong if limit.open_high else right).append(limit.high)
    if kind is float:
        wrong += [math.nan, math.inf, -math.inf]
    right.append(limit.low + 1 if kind is int or limit.high is None else limit.high / 2)
    for value in map(kind, wrong):
        with pytest.raises(ValueError, match=rf"train\.{name} is .*; it must be ") as error:
            checked(with_value(FULL, name, value))
        assert str(error.value).endswith(".")
    for value in map(kind, right):
        config = with_value(FULL, name, value)
        assert checked(config) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.learning_rate", -1.0, "learning_rate is -1.0; it must be more than 0."),
        ("optimizer.b2", 1.0, "b2 is 1.0; it must be 0 or more, and less than 1."),
        ("optimizer.learning_rate", "1e-4", "learning_rate must be float, not '1e-4'"),
        ("optimizer.name", "sgd", "it must be one of .'adamw', 'adafactor', 'muon'."),
        ("steps", 2.5, "train.steps must be int, not 2.5"),
        ("batch_size", True, "train.batch_size must be int, not True"),
        ("output", "", "train.output .--output. is empty"),
        ("data.kind", "tfrecord", "it must be one of .*'folder'"),
    ],
)
def test_sentences(name, value, message):
    with pytest.raises(ValueError, match=message):
        train(TrainingRun(with_value(FULL, name, value)))


def test_the_configs_that_come_with_k3jax_can_be_meant():
    names = [name for name in config_names() if load_config(name).get("train")]
    assert len(names) > 10
    for name in names:
        config = build(collect(name)).train
        assert checked(config) == config
