"""What a smaller fleet tells of a larger one: whose times its devices get, links nobody timed, and the interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipetune.bench.errors import ConfigError
from pipetune.bench.profile import LayerTimes, TaskKind
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.planning.calibration.carried import (
    FEWER_LAYERS_SD,
    PRIOR_SD,
    deepened,
    half_width,
    larger_fleet,
    slowed,
)
from pipetune.tuner.planning.calibration.observation import Observation, TaskSpan
from pipetune.tuner.planning.calibration.predictor import refit
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from tests.record_factory import make_shape
from tests.study_factory import make_profile

DECODE = TaskKind(8, 1, 64)
SIZES = {f"cpu:{number}": 2**30 for number in range(4)}


def test_workers_that_share_cores_are_as_much_slower_and_others_as_fast() -> None:
    profile, shape = make_profile(), make_shape()
    small = larger_fleet(profile, ("cpu:0", "cpu:1"), dict(list(SIZES.items())[:2]), cores=2).costs(shape)
    # Two cores for two workers, then for four of them, then four cores each among plenty.
    for cores, times in ((2, 2.0), (4, 2.0), (16, 2.0), (6, 3.0)):
        large = larger_fleet(profile, ("cpu:0", "cpu:1"), SIZES, cores=cores).costs(shape)
        ratio = large.layers_s("cpu:3", DECODE) / small.layers_s("cpu:0", DECODE)
        said = larger_fleet(profile, ("cpu:0", "cpu:1"), SIZES, cores=cores).about or ""
        assert f"each CPU worker {1 / times:.2g} times as fast: 4 of them share {cores} cores" in said
        assert ratio == pytest.approx(np.full(shape.num_layers, times))


def test_runs_of_workers_with_more_cores_teach_as_if_they_had_had_fewer() -> None:
    profile, shape = make_profile(), make_shape()
    plan = Plan.from_layer_counts((shape.num_layers,), ("cpu:0",), 8)
    task = TaskSpan(stage=0, rows=8, new_tokens=1, past_tokens=64, seconds=0.05, count=4)
    seen = Observation(
        effective=EffectivePlan(plan=plan, in_flight=1), tasks=(task,), gap_s=(1e-3,), metrics={"duration_s": 1.0}
    )
    model = CostModel.of_workload(shape, Workload(num_prompts=16), (64,) * 16, ProfiledCosts(profile))
    alone = refit(model, [seen]).task_s(plan, DECODE)[0][0]
    sizes = dict(list(SIZES.items())[:2])
    shared = larger_fleet(profile, ("cpu:0",), sizes, cores=2)
    lessons = slowed([seen], ("cpu:0",), tuple(sizes), cores=2)
    beside = refit(CostModel.of_workload(shape, Workload(num_prompts=16), (64,) * 16, shared.costs(shape)), lessons)
    assert lessons[0].gap_s == (2e-3,)
    # As it was told: what one worker took on both cores takes twice as long on one of them.
    assert beside.task_s(plan, DECODE)[0][0] == pytest.approx(2 * alone, rel=0.02)
    assert slowed([seen], ("cpu:0",), ("cpu:0",), cores=2) == [seen]


def test_links_that_nobody_timed_are_as_slow_as_the_slowest_or_nominal() -> None:
    profile, shape = make_profile(), make_shape()
    costs = larger_fleet(profile, ("cpu:0", "cpu:1"), SIZES, cores=4).costs(shape)
    slowest = max(link.seconds(1 << 20) for link in profile.links)
    assert costs.hop_s("cpu:2", "cpu:3", 1 << 20) == slowest
    assert costs.hop_s("cpu:0", "cpu:1", 1 << 20) == profile.links[0].seconds(1 << 20)
    alone = larger_fleet(None, ("cpu:0",), SIZES, cores=4)
    assert "nominal" in (alone.about or "")
    assert alone.costs(shape).hop_s("cpu:0", "cpu:1", 0) > 0


def test_a_kind_of_device_that_the_smaller_fleet_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="cuda:0 is like none of the smaller fleet cpu:0"):
        larger_fleet(None, ("cpu:0",), {"cuda:0": 2**30}, cores=4)


def test_a_profile_of_few_layers_is_one_of_many_kind_by_kind() -> None:
    profile, shape = make_profile(), make_shape()
    plain = shape.layers[0]
    sliding = plain.model_copy(update={"kind": "sliding_attention"})
    device = profile.devices[0]
    slow = LayerTimes(layers=(1,), times=tuple(one.model_copy(update={"seconds": 1.0}) for one in device.overhead))
    small = profile.model_copy(
        update={
            "shape": shape.model_copy(update={"layers": (plain, sliding), "num_parameters": 9}),
            "devices": (
                device.model_copy(update={"layers": (device.layers[0].model_copy(update={"layers": (0,)}), slow)}),
            ),
        }
    )
    whole = shape.model_copy(update={"layers": (sliding, plain, plain, sliding)})
    deep = deepened(small, profile.model, whole)
    assert deep.shape == whole
    few, many = ProfiledCosts(small).layers_s("cpu:0", DECODE), ProfiledCosts(deep).layers_s("cpu:0", DECODE)
    assert list(many) == [few[1], few[0], few[0], few[1]]
    assert few[0] < few[1] == 1.0
    for other, message in (
        (whole.model_copy(update={"hidden_size": 7}), "with fewer layers: hidden_size 576 and 7; lower the"),
        (
            whole.model_copy(update={"layers": (plain, plain.model_copy(update={"weight_bytes": 1}))}),
            "no layer like its layer 1; lower the",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            deepened(small, profile.model, other)


def test_the_interval_narrows_by_steps_that_held_and_widens_by_those_that_did_not() -> None:
    before = half_width([])
    assert math.exp(before) - 1 > PRIOR_SD
    assert half_width([[0.01, -0.01]]) < before
    assert half_width([[0.01], [0.0], [-0.01]]) < half_width([[0.01]])
    assert half_width([[0.8]]) > before
    assert half_width([], FEWER_LAYERS_SD) == pytest.approx(2 * before)
    # Plans that differ among each other say as much as steps that do.
    assert half_width([[0.3, -0.3]]) > half_width([[0.0, 0.0]])
