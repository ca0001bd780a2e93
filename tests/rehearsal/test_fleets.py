"""Fleets of stubbed GPUs give what the unsplit model gives, over NCCL's stand-in and over staging, captured and not."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.profile import ProfileGrid
from pipetune.bench.runtime.wiring import COMMUNICATOR_BYTES
from pipetune.bench.spec import ModelSpec, Sampling
from tests.rehearsal.conftest import IS_WHOLE, UseMachine
from tests.rehearsal.fleets import LAYERS, PROTOCOL, WORKLOAD, equal, run, tiny_model
from tests.rehearsal.stub.machine import GIB, StubMachine
from tests.tiny_models import save_tiny_model
from tests.workers import worker_pids

FOUR = ("cuda:0", "cuda:1", "cuda:2", "cuda:3")


@pytest.mark.parametrize("family", ["mixtral", *(("llama", "gpt2", "gemma2") if IS_WHOLE else ())])
def test_over_nccl(family: str, use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(4))
    with Fleet.start(tiny_model(tmp_path, family), FOUR, log_dir=tmp_path / "logs") as fleet:
        # Communicators are opened later, and outside of what a cap covers.
        assert all(79 * GIB - bytes_ >= 6 * COMMUNICATOR_BYTES for bytes_ in fleet.device_bytes.values())
        assert fleet.shape.task_bytes is not None
        assert fleet.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        for counts in ((LAYERS,), (3, 1), (1,) * 4):
            outcome = equal(run(fleet, counts))
            assert outcome.transport == ("nccl" if len(counts) > 1 else "local")
            assert not [note for note in outcome.notes if note.startswith("cuda_graphs")]
        outcome = equal(run(fleet, (2, 2), graphs=False, replicas=2, replica_devices=(FOUR[2:],)))
        assert outcome.transport == "nccl"


@pytest.mark.parametrize(("devices", "family"), [(("cuda:0", "cuda:0"), "gemma2"), (("cuda:0", "cpu:0"), "llama")])
def test_over_staging(devices: tuple[str, ...], family: str, use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(1))
    with Fleet.start(tiny_model(tmp_path, family), devices, log_dir=tmp_path / "logs") as fleet:
        assert module_loading(fleet) is None
        assert fleet.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        outcome = equal(run(fleet, (3, 1)))
        assert outcome.transport == "gloo+staging"
        assert any("share a GPU" in note for note in outcome.notes) == (devices[0] == devices[1])


def module_loading(fleet: Fleet) -> str | None:
    """How the workers' CUDA loads kernels."""
    (found,) = {psutil.Process(pid).environ().get("CUDA_MODULE_LOADING") for pid in worker_pids(fleet)}
    return found


ONE_CAPTURES_NO_MORE = """
again = module.DecodeGraphs.again


def make(self, key):
    raise RuntimeError("no memory for another graph")


def failing(self, whose):
    second = again(self, whose)
    if self._where == "cuda:1":
        second._make = make.__get__(second)
    return second


module.DecodeGraphs.again = failing
"""
"""One of two workers must take the shares of parts from eager steps, and both stay in step."""


@pytest.mark.timeout(150)
def test_a_profile_over_nccl(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(2), {"pipetune.bench.runtime.kernels.graphs": ONE_CAPTURES_NO_MORE})
    with Fleet.start(tiny_model(tmp_path, "llama"), FOUR[:2], log_dir=tmp_path / "logs") as fleet:
        # Else a kernel's first use would wait for a posted receive.
        assert module_loading(fleet) == "EAGER"
        profile = fleet.profile(ProfileGrid(rows=(1, 3), lengths=(8,), pasts=(12,)))
    assert {(link.source, link.target) for link in profile.links} == {FOUR[:2], FOUR[1::-1]}
    assert [device.device for device in profile.devices] == list(FOUR[:2])
    assert profile.notes == ("cuda_graphs: eager on the parts of cuda:1: no memory for another graph",)
    assert all(time.seconds > 0 for device in profile.devices for time in (*device.layers[0].times, *device.head))


CHOSEN = """
sample = module._Pass.sample


def watched(self, task, logits):
    if self.graphs is not None and not task.is_prefill:
        u = self.drawn_by(task)
        tokens = module.likeliest(logits) if u is None else module.draw(logits, u, self.job.sampling)
        assert module.torch.equal(self.graphs.chosen, tokens)
    return sample(self, task, logits)


module._Pass.sample = watched
"""
"""Every captured step must have chosen what the loop would choose from its logits."""


def test_captured_steps_choose_the_unsplit_models_tokens(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(3), {"pipetune.bench.runtime.loop": CHOSEN})
    with Fleet.start(tiny_model(tmp_path, "llama"), FOUR[:3], log_dir=tmp_path / "logs") as fleet:
        # Graphs draw as the first job behind their capture wants it: the last stage is another one each time.
        for sampling, split in (
            (None, (1, 1, 2)),
            (Sampling(temperature=0.8), (1, 2, 1)),
            (Sampling(top_k=9, top_p=0.8, seed=3), (1, 1, 2)),
        ):
            workload = WORKLOAD.model_copy(update={"sampling": sampling})
            assert fleet.make_reference(tmp_path / "reference", workload, PROTOCOL) is None
            for counts in ((LAYERS,), split):
                outcome = equal(run(fleet, counts, workload=workload))
                assert not [note for note in outcome.notes if note.startswith("cuda_graphs")]


HOST_BOUND = """
import time

forward = module.LlamaDecoderLayer.forward


def launch(self, *args, **kwargs):
    time.sleep(0.3)
    return forward(self, *args, **kwargs)


module.LlamaDecoderLayer.forward = launch
"""
"""A host that launches the kernels of a layer slowly, which is nothing to a graph's replay."""


@pytest.mark.timeout(150)
def test_the_parts_of_captured_steps_are_timed_within_their_graph(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(1), {"transformers.models.llama.modeling_llama": HOST_BOUND})
    model = ModelSpec(name=str(save_tiny_model(tmp_path / "llama", "llama", 2)))
    with Fleet.start(model, FOUR[:1], log_dir=tmp_path / "logs") as fleet:
        profile = fleet.profile(ProfileGrid(rows=(2,), lengths=(1,), pasts=(12,)))
    assert profile.notes == ()
    (device,) = profile.devices
    (head_s,) = (time.seconds for time in device.head if time.past_tokens)
    (layer_s,) = (time.seconds for time in device.layers[0].times if time.past_tokens)
    # The replay's parts; by the stamps of an eager step the host's time would be the layers', and this 0.003.
    assert head_s / layer_s > 0.02


COMPILER = """
import torch

seen = set()


def compile(function, backend):
    def run(*given, **named):
        kind = tuple(value.shape for value in given if isinstance(value, torch.Tensor))
        if kind not in seen:
            seen.add(kind)
            backend(None, None)
        return function(*given, **named)

    return run


torch.compile = compile
torch._dynamo.lookup_backend = lambda name: lambda graph, inputs: torch.cuda.synchronize()
"""
"""Makes a graph for each shape, and waits for the device meanwhile, as a compiler does that tries kernels out."""


@pytest.mark.parametrize("graphs", [False, True] if IS_WHOLE else [False])
def test_nothing_is_compiled_while_a_receive_is_posted(graphs: bool, use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(2), {"pipetune.bench.runtime.kernels.compiled": COMPILER})
    with Fleet.start(tiny_model(tmp_path, "llama"), FOUR[:2], log_dir=tmp_path / "logs") as fleet:
        assert fleet.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        outcome = equal(run(fleet, (2, 2), graphs=graphs, compile=True))
        assert not [note for note in outcome.notes if note.startswith(("compile", "cuda_graphs"))]
        assert outcome.prepare_s
