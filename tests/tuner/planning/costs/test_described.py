"""Devices in a file: what is described is what is predicted with; every mistake names file, key and way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipetune.bench.errors import ConfigError
from pipetune.bench.memory import LayerShape, ModelShape, TaskBytes
from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.costs.described import DescribedDevices, read_devices
from pipetune.tuner.planning.costs.nominal import RATES
from tests.study_factory import make_profile

EXAMPLE = Path("examples/devices-2xa100-2xa10.yaml")
PREFILL = TaskKind(rows=4, new_tokens=256, past_tokens=0)
PLAIN = "{name: cuda:0-1, memory_gib: 80, tflops: 100, memory_gb_per_s: 1000}"
ANY = "links: [{between: any, gb_per_s: 20, latency_us: 5}]"


@pytest.fixture
def shape() -> ModelShape:
    layer = LayerShape(weight_bytes=2**24, active_params=2**23, kv_bytes_per_token=1024)
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=2**26,
        layers_prefix="model.layers",
        first_modules=("model.embed_tokens",),
        last_modules=("model.norm", "lm_head"),
        embedding_bytes=2**20,
        head_bytes=2**20,
        other_bytes=4096,
        tied=False,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        vocab_size=1024,
        dtype_bytes=2,
        layers=(layer,) * 4,
    )


def read(folder: Path, text: str) -> DescribedDevices:
    path = folder / "devices.yaml"
    path.write_text(text)
    return read_devices(path)


def test_the_example_describes_four_unlike_gpus(shape: ModelShape) -> None:
    described = read_devices(EXAMPLE)
    assert described.names == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert described.device_bytes(("cuda:2",)) == {"cuda:2": 24 * 2**30}
    costs = described.costs(shape)
    assert costs.layers_s("cuda:2", PREFILL)[0] > 1.5 * costs.layers_s("cuda:0", PREFILL)[0]
    size = 10**9
    assert costs.hop_s("cuda:0", "cuda:1", size) == pytest.approx(10e-6 + 1 / 300)
    assert costs.hop_s("cuda:1", "cuda:2", size) == pytest.approx(20e-6 + 1 / 31.5), "the first that covers a pair"


def test_like_takes_over_and_speed_scales(tmp_path: Path, shape: ModelShape) -> None:
    described = read(tmp_path, f"devices: [{PLAIN}, {{name: cuda:2, like: cuda:0, speed: 0.5, memory_gib: 40}}]\n{ANY}")
    costs = described.costs(shape)
    assert costs.layers_s("cuda:2", PREFILL) == pytest.approx(2 * costs.layers_s("cuda:0", PREFILL))
    ends = [costs.ends_s(name, PREFILL, is_first=False, is_last=True) for name in ("cuda:0", "cuda:2")]
    assert ends[1] == pytest.approx(2 * ends[0])
    assert described.device_bytes(described.names)["cuda:2"] == 40 * 2**30


def test_what_is_left_out_is_usual_for_the_kind(tmp_path: Path) -> None:
    plain, given = (
        read(tmp_path, f"devices: [{{name: cuda:0, memory_gib: 1, tflops: 1, memory_gb_per_s: 1{more}}}]").devices[0]
        for more in ("", ", layer_overhead_us: 7")
    )
    assert plain.rates is not None
    assert given.rates is not None
    assert plain.rates.layer_overhead_s == RATES["cuda"].layer_overhead_s
    assert given.rates.layer_overhead_s == pytest.approx(7e-6)
    assert plain.rates.flops_per_s == 1e12
    assert plain.rates.bytes_per_s == 1e9


def test_a_profiled_device_lends_times_memory_and_links(tmp_path: Path) -> None:
    profile = make_profile()
    (tmp_path / "profile.json").write_text(profile.model_dump_json())
    like = "like: {profile: profile.json, device: "
    described = read(tmp_path, f"devices: [{{name: cpu:0, {like}cpu:0}}}}, {{name: cpu:1, {like}cpu:1}}, speed: 2}}]")
    costs = described.costs(profile.shape)
    assert costs.layers_s("cpu:0", PREFILL) == pytest.approx(2 * costs.layers_s("cpu:1", PREFILL))
    assert described.device_bytes(("cpu:0",)) == {"cpu:0": profile.device_bytes["cpu:0"]}
    link = next(link for link in profile.links if (link.source, link.target) == ("cpu:0", "cpu:1"))
    assert costs.hop_s("cpu:0", "cpu:1", 0) == pytest.approx(link.latency_s)
    with pytest.raises(ConfigError, match="another model is planned for; give its own profile"):
        described.costs(profile.shape.model_copy(update={"vocab_size": 7}))


def test_a_profile_of_gpus_is_the_models_own_where_none_takes_part(tmp_path: Path) -> None:
    profile = make_profile()
    tasks = TaskBytes(prompt=((8, 2000, 3000),), chunk=(), decode=((8, 2000, 3000),))
    shape = profile.shape.model_copy(update={"task_bytes": tasks})
    (tmp_path / "profile.json").write_text(profile.model_copy(update={"shape": shape}).model_dump_json())
    described = read(tmp_path, "devices: [{name: cpu:0, like: {profile: profile.json, device: cpu:0}}]")
    assert described.task_bytes == tasks
    # A worker on the CPU, which reads the model, has not run tasks of a GPU.
    assert described.costs(profile.shape).layers_s("cpu:0", PREFILL).shape == (profile.shape.num_layers,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a mapping with devices: and links:"),
        ("devices: [", "malformed YAML"),
        ("links: []", "devices: it is missing"),
        ("devices: []", "devices: Tuple should have at least 1 item"),
        (f"devices: [{PLAIN}]\nlink: []", "link: unknown key; did you mean links?"),
        ("devices: [{name: cuda:0, memory: 80}]", r"devices\[0\].memory: unknown key; did you mean memory_gib"),
        ("devices: [{name: cuda:0, memory_gib: -1}]", r"devices\[0\].memory_gib: .*greater than 0 \(given: -1\)"),
        ("devices: [{name: gpu:0}]", r"devices\[0\].name: 'gpu:0' is not a device; write cpu:0-1"),
        ("devices: [{name: cuda:0, memory_gib: 1}]", "cuda:0 has no tflops and no memory_gb_per_s; give it, or like"),
        (f"devices: [{PLAIN}, {PLAIN}]", r"devices\[1\].name: cuda:0 is described twice"),
        ("devices: [{name: cuda:0, like: cuda:1}]", r"devices\[0\].like: cuda:1 is not described above; it is the fir"),
        (
            "devices: [{name: cuda:0, like: {profile: p.json, device: cpu:0}}]",
            "like.profile: .*p.json: cannot read",
        ),
        (f"devices: [{PLAIN}]", r"links: nothing says what lies between cuda:0 and cuda:1; add \{between"),
        (f"devices: [{PLAIN}]\nlinks: [{{between: [cuda:0-2], gb_per_s: 1, latency_us: 0}}]", "cuda:2 is not among"),
        (f"devices: [{PLAIN}]\nlinks: [{{between: [], gb_per_s: 1, latency_us: 0}}]", "between: names no device"),
        (f"devices: [{PLAIN}]\nlinks: [{{between: any, gb_per_s: 0, latency_us: 0}}]", "gb_per_s: .*greater than 0"),
        (f"devices: [{PLAIN}]\nlinks: [{{between: any, latency_us: 0}}]", r"links\[0\].gb_per_s: it is missing"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path, text)
    assert str(tmp_path / "devices.yaml") in str(raised.value)


def test_devices_that_are_not_described_are_refused(tmp_path: Path) -> None:
    described = read(tmp_path, f"devices: [{PLAIN}]\n{ANY}")
    with pytest.raises(ConfigError, match=r"cpu:0 is not described in .*devices.yaml, which has cuda:0, cuda:1"):
        described.device_bytes(("cpu:0",))
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot read the devices: No such file"):
        read_devices(tmp_path / "nowhere.yaml")


def test_cards_have_rates_of_their_own_and_nvlink_within_a_name() -> None:
    described = read_devices(Path("2xA100-80GB,2xT4"))
    assert described.names == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert [device.memory_bytes // 2**30 for device in described.devices] == [80, 80, 15, 15]
    rates = [device.rates.flops_per_s for device in described.devices if device.rates]
    assert rates == [312e12, 312e12, 65e12, 65e12]
    links = {pair: link.bytes_per_s for pair, link in described.links.items()}
    assert links["cuda:0", "cuda:1"] == 300e9
    assert {links[pair] for pair in links if set(pair) != {"cuda:0", "cuda:1"}} == {31.5e9}


def test_every_card_can_be_described(tmp_path: Path) -> None:
    cards = yaml.safe_load(Path("tuner/planning/costs/cards.yaml").read_text(encoding="utf-8"))
    for name, values in cards.items():
        (device, _) = read_devices(Path(f"2x{name}")).devices
        assert device.rates is not None
        assert device.rates.bytes_per_s == values["memory_gb_per_s"] * 1e9
    # What is said beside a card counts before it.
    path = tmp_path / "devices.yaml"
    path.write_text("devices: [{name: cuda:0, card: H100, tflops: 400}]", encoding="utf-8")
    (device,) = read_devices(path).devices
    assert device.rates is not None
    assert (device.rates.flops_per_s, device.rates.bytes_per_s) == (400e12, 3350e9)
    path.write_text("devices: [{name: cuda:0, card: H1000}]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"devices\[0\]\.card: 'H1000' is no card that is known here"):
        read_devices(path)
