"""What must be equal between processes of a study, and how devices compare by their places."""

from __future__ import annotations

from typing import Any

import pytest

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Machine
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.search.shared.joining import StudyKey
from tests.record_factory import make_machine


def asked(devices: str, machine: Machine, **values: Any) -> StudyKey:
    return StudyKey.of(TuneConfig.model_validate({"model": {"name": "m"}, "devices": devices, **values}), machine)


def machine(*names: str, links: tuple[str, ...] = ()) -> Machine:
    made = make_machine(gpus=len(names))
    gpus = tuple(gpu.model_copy(update={"name": name}) for gpu, name in zip(made.hardware.gpus, names, strict=True))
    hardware = made.hardware.model_copy(update={"gpus": gpus, "links": links})
    return made.model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})


LIKE = machine("L4", "L4", "L4", "L4", links=("0-1:PIX", "0-2:SYS", "0-3:SYS", "1-2:SYS", "1-3:SYS", "2-3:PIX"))


@pytest.mark.parametrize("devices", ["cuda:2-3", "cuda:1,cuda:0"])
def test_other_devices_of_the_same_kind_ask_the_same(devices: str) -> None:
    own, other = asked("cuda:0-1", LIKE), asked(devices, LIKE)
    own.require(other, study="s")
    assert own.devices == other.devices


@pytest.mark.parametrize(
    ("devices", "named"),
    [("cuda:0,cuda:2", "links: "), ("cuda:0", "devices: "), ("cuda:0,cuda:0", "devices: "), ("cpu:0-1", "devices: ")],
)
def test_devices_that_are_linked_or_shared_otherwise_ask_something_else(devices: str, named: str) -> None:
    with pytest.raises(StudyError, match=rf"shared study s asks something else(.|\n)*{named}"):
        asked("cuda:0-1", LIKE).require(asked(devices, LIKE), study="s")


def test_unlike_devices_compare_by_place() -> None:
    unlike = machine("L4", "A100", "L4", "A100")
    asked("cuda:0-1", unlike).require(asked("cuda:2-3", unlike), study="s")
    with pytest.raises(StudyError, match=r"devices: \[L4 \(0\), A100 \(1\)\] → \[A100 \(0\), L4 \(1\)\]"):
        asked("cuda:0-1", unlike).require(asked("cuda:3,cuda:0", unlike), study="s")


def test_uuids_and_seeds_are_each_ones_own() -> None:
    other = LIKE.hardware.model_copy(
        update={"gpus": tuple(gpu.model_copy(update={"uuid": f"other-{gpu.uuid}"}) for gpu in LIKE.hardware.gpus)}
    )
    first, second = (
        asked("cuda:0-1", LIKE),
        asked("cuda:0-1", LIKE.model_copy(update={"hardware": other}), seed=5, n_trials=3),
    )
    first.require(second, study="s")
    assert first == second


def test_other_hardware_says_only_what_of_it_differs() -> None:
    with pytest.raises(StudyError, match="runs on other hardware") as caught:
        asked("cpu:0-1", make_machine()).require(asked("cpu:0-1", make_machine(gpus=1), seed=2), study="s")
    assert all("hardware." in line for line in str(caught.value).splitlines()[1:-1])
