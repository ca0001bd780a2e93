"""What plans are predicted to give under a workload's arrivals, and the highest rate that each sustains."""

import itertools
import statistics
from collections.abc import Sequence

from pipetune.bench.load.arrivals import arrival_times_s, unit_trace
from pipetune.bench.load.rates import RateSearch
from pipetune.bench.load.traces import Trace
from pipetune.bench.spec import EffectivePlan, Workload
from pipetune.tuner.planning.simulation.load import LoadedRequest, LoadPrediction, simulate_load
from pipetune.tuner.planning.simulation.model import CostModel

REQUESTS = 1000
"""At least so many are simulated: short runs flatter."""
_ROUGH = 300
TRACES = 3
"""Seeds, over which the highest rate is a median."""


class Load:
    """The requests of a workload as they come, and what plans make of them."""

    def __init__(self, model: CostModel, workload: Workload, trace: Trace | None) -> None:
        """`model` has the lengths of the workload's prompts; `trace` is its own, where its arrivals are recorded."""
        assert workload.arrivals is not None
        self._model, self._workload, self._arrivals = model, workload, workload.arrivals
        if trace is None:
            lens = itertools.cycle(zip(model.prompt_lens, model.output_lens, strict=True))
            self._lens = list(itertools.islice(lens, max(REQUESTS, len(model.prompt_lens))))
            self._times_s: Sequence[float] = arrival_times_s(self._arrivals, len(self._lens))
        else:
            self._lens = [
                (one.input_len or workload.input_len, one.output_len or workload.output_len) for one in trace.arrivals
            ]
            self._times_s = [one.at_s for one in trace.arrivals]

    def __len__(self) -> int:
        """Requests that are simulated."""
        return len(self._lens)

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest output."""
        inputs, outputs = zip(*self._lens, strict=True)
        return max(inputs), max(outputs)

    def serve(self, effective: EffectivePlan, times_s: Sequence[float] | None = None) -> LoadPrediction:
        """What a plan is thought to give under the arrivals as they are, or at other times."""
        times_s = self._times_s if times_s is None else times_s
        requests = [LoadedRequest(at_s, *own) for at_s, own in zip(times_s, self._lens, strict=False)]
        most = self._arrivals.max_concurrency
        return simulate_load(self._model, effective.plan, effective.in_flight, requests, max_concurrency=most)

    def highest_rate(
        self, effective: EffectivePlan, attainment: float, *, guess: float, is_rough: bool = False
    ) -> float:
        """Requests a second that come as bursty as the workload's and of which so large a share keeps its limits; where
        `is_rough`, to a tenth, from few requests."""
        found = []
        traces, count, tolerance = (1, _ROUGH, 0.1) if is_rough else (TRACES, len(self._lens), 0.02)
        for seed in range(self._arrivals.seed, self._arrivals.seed + traces):
            times = unit_trace(min(count, len(self._lens)), self._arrivals.burstiness, seed)

            def attained(rate: float, times: Sequence[float] = times) -> float:
                served = self.serve(effective, [at / rate for at in times])
                return served.metrics(self._workload.goodput)["slo_attainment"]

            found.append(RateSearch.simulated(attainment, guess=guess, tolerance=tolerance).run(attained))
        return statistics.median(found)
