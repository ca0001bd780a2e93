"""What `tune --dry-run` prints: devices, baselines, the size of the space, and the plans that would run first."""

from pathlib import Path
from typing import Any

from pipetune.bench.fleet.experiment import Experiment
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.progress import Reporter, values_text
from pipetune.tuner.report.document import GAP, Document, Facts, Text
from pipetune.tuner.report.wording import bytes_text
from pipetune.tuner.search.driver import baseline_batch_sizes
from pipetune.tuner.search.policy.acquisition import even_weights
from pipetune.tuner.search.policy.forecaster import Forecaster
from pipetune.tuner.search.policy.history import History
from pipetune.tuner.search.runs import starter_of
from pipetune.tuner.search.space.build import count_raw_partitions
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.search.study_costs import kept_costs, new_space, resolver_of

_SHOWN = 16


class DryRun:
    """A study that does not run. The model is read by a fleet, which ends again; nothing is written."""

    def __init__(self, folder: Path, config: TuneConfig, reporter: Reporter) -> None:
        """Raises a UserError for a model, prompts or bounds that cannot be used."""
        self.folder, self.config = folder, config
        reporter.begin(f"reading {config.model.name}")
        devices, workload = config.concrete_devices, config.workload
        with Experiment.start(
            config.model, devices, exclusive=False, start_fleet=starter_of(config), on_progress=reporter.fleet
        ) as experiment:
            fleet, self.shape = experiment.fleet, experiment.fleet.shape
            lens = fleet.prompt_lens(workload)
            resolve = resolver_of(fleet, config, lens)
            cost, self.over_profile = kept_costs(fleet, config, lens, resolve)
            self.space = new_space(config, devices, cost, resolve)
        self.replicas = tuple(sorted(set(self.space.replicas))) or (1,)
        self.baseline_batch_sizes = baseline_batch_sizes(config.baseline_batch_sizes, workload.num_prompts)
        raw = count_raw_partitions(config.space, self.shape, len(devices), workload.num_prompts)
        self.num_partitions = len(self.space.partitions) if config.engine else raw
        forecaster = Forecaster(self.space, cost, resolve, objectives=config.objectives, constraints=config.constraints)
        forecast = forecaster.look(History(self.space, resolve))
        worth = forecast.worth(forecast.scalar(even_weights(len(config.objectives)))[0])
        first = sorted(range(len(worth)), key=lambda place: -worth[place])[:_SHOWN]
        # Plans that are predicted to be best: the first ones would run first, and what they give decides what follows.
        self.queue = [(forecast.effective[place].plan, forecast.metrics.of(place)[0]) for place in first]

    def json(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {
            "schema_version": 1,
            "study": str(self.folder),
            "model": self.config.model.model_dump(mode="json"),
            "architecture": self.shape.architecture,
            "layers": self.shape.num_layers,
            "devices": list(self.config.concrete_devices),
            "baseline_batch_sizes": list(self.baseline_batch_sizes),
            "space": {
                "partitions": self.num_partitions,
                "ranked_partitions": len(self.space.partitions),
                "replicas": list(self.replicas),
                "micro_batch_sizes": list(self.space.micro_batch_sizes),
                "prefill_micro_batch_sizes": list(self.space.prefill_sizes),
                "prefill_chunk_sizes": list(self.space.chunk_sizes),
                "memory_fractions": list(self.space.memory_fractions),
                "compile": list(self.space.compile),
                "points": self.space.num_points,
            },
            "n_trials": self.config.n_trials,
            "predicted_from": "profile" if self.over_profile else "nominal rates",
            "queue": [
                {
                    "plan": plan.model_dump(mode="json"),
                    "predicted_s": round(predicted["duration_s"], 3),
                    "predicted": {name: round(value, 4) for name, value in predicted.items()},
                }
                for plan, predicted in self.queue
            ],
        }

    def document(self) -> Document:
        """For people."""
        space, config = self.space, self.config
        finals = f"{config.finalists} best plans and the baseline, {config.finalist_rounds} rounds or more"
        facts = {
            "model": f"{config.model.name} ({self.shape.architecture}, {self.shape.num_layers} layers)",
            "devices": ", ".join(config.concrete_devices),
            "study": str(self.folder),
            "baseline": f"batch sizes {_joined(self.baseline_batch_sizes)}",
            "partitions": f"{self.num_partitions}, of which the best {len(space.partitions)} are ranked",
            "replicas": _joined(self.replicas),
            **(_sizes(space) if space.engine is None else _limits(space)),
            "space": f"{space.num_points} points, {config.n_trials} trials",
            "finals": finals if config.finalists else "none",
        }
        names = ("output_throughput", "total_token_throughput")
        queue = []
        for plan, predicted in self.queue:
            rate = next(name for name in names if name in predicted)
            values = values_text(predicted, (*config.objectives, rate))
            queue.append(Text(f"  {plan.describe()}   {values} · {predicted['duration_s']:.2f} s"))
        source = "a profile of this machine" if self.over_profile else "nominal rates, until the machine is profiled"
        claim = f"Predictions are from {source}, and no claim: nothing was run."
        return Document(parts=(Facts(tuple(facts.items())), GAP, Text("predicted to be best:"), *queue, Text(claim)))


def _sizes(space: SearchSpace) -> dict[str, str]:
    return {
        "micro-batches": _joined(space.micro_batch_sizes),
        "prefill": _joined(space.prefill_sizes),
        "chunks": ", ".join("whole prompts" if size is None else str(size) for size in space.chunk_sizes),
        "memory caps": _joined(space.memory_fractions)
        + (" (others make no difference)" if len(space.memory_fractions) == 1 else ""),
        "compiled": " and ".join("yes" if switch else "no" for switch in space.compile),
    }


def _limits(space: SearchSpace) -> dict[str, str]:
    """Those of another engine."""
    limits = {"token budgets": space.token_budgets, "sequences": space.max_num_seqs}
    texts = {name: ", ".join(str(most or "its own") for most in choices) for name, choices in limits.items()}
    if space.kv_cache_sizes:
        texts["KV cache"] = ", ".join(map(bytes_text, space.kv_cache_sizes))
    return {"shards": _joined(tuple(sorted(set(space.shards)))), **texts}


def _joined(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
