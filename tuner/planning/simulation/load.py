"""Requests that arrive over time, served by a plan whose tasks take what they are predicted to: one event at a time.

The runtime's own policy (`bench.load.admission`) says what the first stage does next. A task goes through the stages as
in `schedule.simulate_plans`: a stage begins it when it is free and the message of the stage before has come, runs ahead
of the next one no further than the rings go, and tokens are known on the first stage a hop after the last is done.
Replicas are pipelines of their own; a request goes to the one with the fewest requests.
"""

import heapq
import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import NamedTuple

from pipetune.bench.load.admission import Admission, Decode, Prefill, Request, Rules, Wait, deal, rules_of
from pipetune.bench.load.arrivals import arrival_times_s
from pipetune.bench.load.rates import RateSearch
from pipetune.bench.metrics import good_requests, latency_metrics
from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import Goodput, Plan
from pipetune.tuner.planning.simulation.model import CostModel, of_device
from pipetune.tuner.planning.simulation.schedule import RING_DEPTH

_TRACES, ENOUGH = 3, 200
"""Most traces that a run is predicted from, and requests of all together that are enough."""
_ROUGHLY = 0.1
"""Between two rates that differ by no more the highest is found, where a rough guess will do."""


class LoadedRequest(NamedTuple):
    """One request: when it arrives, and its lengths in tokens."""

    at_s: float
    prompt_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True)
class LoadPrediction:
    """What a plan is thought to give under arrivals."""

    times_s: Mapping[str, tuple[float, ...]]
    """`ttft`, `tpot` (0 for one token) and `e2el` of each request, counted from its arrival, in the order given."""
    duration_s: float
    """From time 0 to the last token."""
    busy_s: tuple[float, ...]
    """Seconds that each stage of all replicas computes."""
    idle_s: float
    """Seconds, over all stages, in which their replica had no request."""

    def metrics(self, goodput: Goodput | None = None, *, num_requests: int | None = None) -> dict[str, float]:
        """Latencies, rates and ratios by the names of `bench.metrics`; percentiles that so many requests can have."""
        count, area = len(self.times_s["e2el"]), len(self.busy_s) * self.duration_s
        values = {"request_throughput": count / self.duration_s, "duration_s": self.duration_s}
        if goodput is not None:
            good = good_requests(self.times_s, goodput.limits)
            values |= {"request_goodput": good / self.duration_s, "slo_attainment": good / count}
        # Of one token there is no time per token.
        several = {**self.times_s, "tpot": [time for time in self.times_s["tpot"] if time > 0]}
        return values | {
            **latency_metrics(several, num_requests or count),
            "bubble_ratio": 1.0 - (sum(self.busy_s) + self.idle_s) / area,
            "idle_ratio": self.idle_s / area,
        }


@singledispatch
def simulate_load(
    model: CostModel,
    plan: Plan,
    in_flight: int,
    requests: Sequence[LoadedRequest],
    *,
    max_concurrency: int | None = None,
) -> LoadPrediction:
    """Serves the requests, which come in the order of their times; each replica has `in_flight` micro-batches at once.
    Models of engines that form their batches otherwise are registered with another way.

    Beyond `max_concurrency` in the system at once others wait before it, and their latencies count that.
    """
    shares = deal(plan.replicas, max_concurrency)
    rules = rules_of(plan, in_flight, joins=model.shape.joins, whole_slots=model.shape.whole_slots)
    replicas: list[_Replica] = []
    for index, (_, places) in enumerate(shares):
        replicas.append(_Replica(model, plan.replica(index), rules, replicas, requests, places))
    events: list[tuple[float, int, Callable[[], None]]] = []
    counter = itertools.count()

    def note(at_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(events, (at_s, next(counter), happens))

    for replica, (own, _) in zip(replicas, shares, strict=True):
        for number in range(len(requests))[own]:
            note(requests[number].at_s, partial(replica.outside.append, number))
    while events:
        now, _, happens = heapq.heappop(events)
        happens()
        # What happens at one moment is known before anything is decided.
        if events and events[0][0] == now:
            continue
        for replica in replicas:
            replica.admit(now)
            while (task := replica.begin(now)) is not None:
                order, free_s, ended_s, known_s = task
                note(free_s, lambda: None)
                note(known_s, partial(replica.conclude, order, ended_s))
    first, last = ([0.0] * len(requests) for _ in range(2))
    for replica in replicas:
        for number, (begin, end) in replica.served.items():
            first[number], last[number] = begin, end
    idle_s = sum(len(replica.busy_s) * replica.idle_s(max(last)) for replica in replicas)
    return prediction_of(requests, first, last, [replica.busy_s for replica in replicas], idle_s)


def prediction_of(
    requests: Sequence[LoadedRequest],
    first_s: Sequence[float],
    last_s: Sequence[float],
    busy_s: Sequence[Sequence[float]],
    idle_s: float,
) -> LoadPrediction:
    """What is predicted where first and last tokens of requests were known at these times; `busy_s[replica][stage]`."""
    pairs = list(zip(requests, first_s, last_s, strict=True))
    return LoadPrediction(
        times_s={
            "ttft": tuple(begin - one.at_s for one, begin, _ in pairs),
            "tpot": tuple((end - begin) / max(one.output_len - 1, 1) for one, begin, end in pairs),
            "e2el": tuple(end - one.at_s for one, _, end in pairs),
        },
        duration_s=max(last_s),
        busy_s=tuple(itertools.chain.from_iterable(busy_s)),
        idle_s=idle_s,
    )


def under_load(model: CostModel, plan: Plan, in_flight: int, *, most: int | None = None) -> dict[str, float]:
    """Metrics of a run under the model's arrivals, by the names of `bench.metrics`: means over its traces; of the first
    `most` requests alone where a rough guess will do, by default of all of a run's, of its first iterations."""
    arrivals = model.arrivals
    assert arrivals is not None
    if arrivals.slo_attainment is not None:
        assert arrivals.request_rate is not None
        tolerance = _ROUGHLY if most else RateSearch.tolerance
        search = RateSearch.simulated(arrivals.slo_attainment, guess=arrivals.request_rate, tolerance=tolerance)
        tried: dict[float, dict[str, float]] = {}
        while (rate := search.next()) is not None:
            once = arrivals.model_copy(update={"request_rate": rate, "slo_attainment": None})
            tried[rate] = under_load(replace(model, arrivals=once), plan, in_flight, most=most)
            search.shares[rate] = tried[rate]["slo_attainment"]
        least = min(tried)
        return {**tried[search.sustained or least], "max_request_rate": search.highest or least}
    lens = list(zip(model.prompt_lens, model.output_lens, strict=True))
    number = max(1, min(_TRACES, ENOUGH // len(lens))) if most is None and arrivals.times_s is None else 1
    found = []
    for seed in range(arrivals.seed, arrivals.seed + number):
        times_s = arrival_times_s(arrivals.model_copy(update={"seed": seed}), len(lens))
        requests = [LoadedRequest(at_s, *own) for at_s, own in zip(times_s[:most], lens, strict=False)]
        served = simulate_load(model, plan, in_flight, requests, max_concurrency=arrivals.max_concurrency)
        tokens = sum(one.output_len for one in requests)
        found.append(served.metrics(model.goodput, num_requests=len(lens)))
        found[-1]["output_throughput"] = tokens / served.duration_s
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


class _Replica:
    """One pipeline, and the state of its stages."""

    def __init__(
        self,
        model: CostModel,
        plan: Plan,
        rules: Rules,
        together: "Sequence[_Replica]",
        requests: Sequence[LoadedRequest],
        places: int | None,
    ) -> None:
        """`together` are all replicas, `places` how many requests this one has at once."""
        self.model, self.plan, self._together, self.requests = model, plan, together, requests
        self.outside, self._places = deque[int](), places or len(requests)
        count = len(plan.stages)
        self.admission, self._costs = Admission(rules), model.known_tasks(plan.stages)
        self.busy_s, self._free_s = [0.0] * count, [0.0] * count
        self.served: dict[int, tuple[float, float]] = {}
        """When each request's first and last token were known."""
        self._starts_s: list[list[float]] = [[] for _ in range(count)]
        # A stage alone hands nothing on.
        self._gaps_s = [of_device(model.gaps_s, name) if count > 1 else 0.0 for name in plan.devices]
        self._tokens: Counter[int] = Counter()
        """By the requests' numbers."""
        self._empty_since_s = self._idle_s = 0.0

    def admit(self, now_s: float) -> None:
        """Lets in whom there is a place for."""
        while self.outside and len(self.admission) < self._places:
            number = self.outside.popleft()
            if not len(self.admission):
                self._idle_s += now_s - self._empty_since_s
            self.admission.arrive(Request(number=number, prompt_len=self.requests[number].prompt_len))

    def idle_s(self, end_s: float) -> float:
        """Seconds without a request, up to an end at which there is none."""
        return self._idle_s + end_s - self._empty_since_s

    def begin(self, now_s: float) -> tuple[Prefill | Decode, float, float, float] | None:
        """A task that is ordered now; when the first stage is free, and its tokens known on the last and there."""
        if self._free_s[0] > now_s or not len(self.admission):
            return None
        order = self.admission.decide()
        if isinstance(order, Wait):
            return None
        ended_s, known_s = self._go_through(now_s, tuple(self._kind(one) for one in order.together))
        return order, self._free_s[0], ended_s, known_s

    def _kind(self, order: Prefill | Decode) -> TaskKind:
        if isinstance(order, Prefill):
            return TaskKind(order.rows, order.tokens, order.first_token, order.samples)
        # All rows share one clock.
        past = max(request.prompt_len + self._tokens[request.number] - 1 for request in order.requests)
        return TaskKind(order.rows, 1, past)

    def _go_through(self, now_s: float, kinds: tuple[TaskKind, ...]) -> tuple[float, float]:
        if kinds not in self._costs:
            self._costs[kinds] = self.model.joined_s(self.plan, kinds)
        busy, hops, back = self._costs[kinds]
        ready = end = now_s
        index = len(self._starts_s[0])
        for stage, own_s in enumerate(busy):
            start = max(ready, self._free_s[stage])
            took = own_s * self._alone(start, kinds[0])
            end = start + took
            self._starts_s[stage].append(start)
            self.busy_s[stage] += took
            self._free_s[stage] = end + self._gaps_s[stage]
            if stage + 1 < len(busy) and index >= 2 * RING_DEPTH:
                # The sends under way are in the way of this one.
                self._free_s[stage] = max(self._free_s[stage], self._starts_s[stage + 1][index - 2 * RING_DEPTH])
            ready = end + (hops[stage] if stage + 1 < len(busy) else back)
        return end, ready

    def _alone(self, start_s: float, kind: TaskKind) -> float:
        """What a task takes less because others do not compute when it begins."""
        contention = self.model.contention
        if contention is None or contention.devices < 2:
            return 1.0
        others = sum(free_s > start_s for replica in self._together for free_s in replica._free_s)
        share = min(others / (contention.devices - 1), 1.0)
        return math.exp(-contention.of(decode=kind.is_decode) * (1.0 - share))

    def conclude(self, order: Prefill | Decode, at_s: float) -> None:
        for one in order.together:
            if one.samples:
                self._conclude(one, at_s)

    def _conclude(self, order: Prefill | Decode, at_s: float) -> None:
        finished = set()
        for request in order.requests:
            self._tokens[request.number] += 1
            first, _ = self.served.get(request.number, (at_s, at_s))
            self.served[request.number] = first, at_s
            if self._tokens[request.number] == self.requests[request.number].output_len:
                finished.add(request.number)
        if isinstance(order, Prefill):
            self.admission.prefilled(order.requests, finished)
        else:
            self.admission.decoded(order.slot, finished)
        if not len(self.admission):
            self._empty_since_s = at_s
