"""The command as users run it, on a tiny model: real processes of ours and of the peers; a second call resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipetune.bench.machine.hardware import cpu_cores
from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.harness import begin_mark, end_mark
from tests.evaluation.peers.__main__ import COMMAND, main
from tests.evaluation.peers.rig import Rig
from tests.evaluation.peers.sides import ALONE, PeerSide, SideError, score_truth
from tests.evaluation.peers.store import read
from tests.evaluation.peers.values import Setting
from tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(cpu_cores() < 2, reason="needs two cores"),
]
WORKLOAD = Workload(num_prompts=4, input_len=16, output_len=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_rounds_are_measured_kept_and_taken_up_again(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"{begin_mark(COMMAND)}\n{end_mark(COMMAND)}\n")
    arguments = ["--quick", "--models", str(folder), "--workload", "4x16x4", "--sides", "hf_one,hf_two,pipeline"]
    arguments += ["-o", str(tmp_path / "out"), "--docs", str(document)]
    assert main([*arguments, "--pairs", "1"]) == 0
    (path,) = (tmp_path / "out").glob("*/llama-custom-quick.json")
    first = read(path)
    assert first is not None
    assert first.absent == {}
    assert set(first.frozen) == {"hf_one", "hf_two", "pipeline"}
    assert [one.contest for one in first.rounds] == ["generate"]
    assert main([*arguments, "--pairs", "2"]) == 0
    second = read(path)
    assert second is not None
    assert second.rounds[:1] == first.rounds
    assert {side: one.tried for side, one in second.frozen.items()} == {
        side: one.tried for side, one in first.frozen.items()
    }
    assert len(second.rounds) == 2
    for one in second.rounds:
        assert sorted(one.order) == ["hf_one", "hf_two", "pipeline"]
        assert tuple(sample.side for sample in one.samples) == one.order
        for sample in one.samples:
            assert sample.error is None
            assert sample.duration_s is not None
            assert (sample.measurement is not None) == (sample.side == "pipeline")
    assert {side: one.tokens_differ for side, one in second.frozen.items()} == dict.fromkeys(second.frozen, 0)
    assert second.tokens is not None
    assert [len(row) for row in second.tokens] == [4] * 4
    assert "n=2" in document.read_text()


def test_pipelines_of_others_give_what_the_whole_model_gives(folder: Path) -> None:
    with Rig(ModelSpec(name=str(folder)), on_start=lambda text: None) as rig:
        alone = PeerSide(rig, "hf_one", WORKLOAD, kind="hf", size=2, ranks=[0], command="generate", **ALONE)
        naive = PeerSide(rig, "hf_pp", WORKLOAD, kind="pp", size=2, command="generate", share=False, together=True)
        truth = alone.run(Setting(rows=4))
        assert naive.run(Setting(rows=2)).tokens == truth.tokens
        gpipe = PeerSide(rig, "gpipe", WORKLOAD, kind="gpipe", size=2, command="gpipe")
        expected = score_truth(rig, WORKLOAD)
        assert expected is not None
        for setting in (Setting(rows=2, cut=2), Setting(rows=1, cut=4)):
            scores = gpipe.run(setting).scores
            assert scores is not None
            for own, other in zip(scores, expected, strict=True):
                assert own == pytest.approx(other, abs=1e-4)
        with pytest.raises(SideError, match="cannot be cut"):
            gpipe.run(Setting(rows=3, cut=2))
        # What failed starts anew.
        assert gpipe.run(Setting(rows=4, cut=3)).scores is not None


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--models", "nothing-here"], "--models"),
        (["--workloads", "strange"], "--workloads"),
        (["--workload", "4x4"], "--workload"),
        (["--sides", "nobody"], "--sides"),
    ):
        assert main(["--quick", "-o", str(tmp_path), *arguments]) == 2
        assert said in capsys.readouterr().err
