"""When a search has nothing left to gain: no plan promises more than the noise hides, several times in a row."""

from __future__ import annotations

from pipetune.tuner.search.policy.acquisition import chance_of_gain, draw_weights
from pipetune.tuner.search.policy.forecast import Forecast
from pipetune.tuner.search.policy.forecaster import Forecaster
from pipetune.tuner.search.policy.history import History, Lessons
from pipetune.tuner.study.search_log import Stop

LEAST_TRIALS, CONVERGED_IN_A_ROW = 6, 3
"""Before so many trials, and before so many forecasts without promise, no search ends by itself."""
MARGIN = 0.5
"""Share of the noise of a run that several rounds of finals can tell. A gain below it is none."""
LEAST_CHANCE = 0.1
"""A plan that gains more than that with less probability promises nothing."""
_WEIGHTINGS = 12
"""Ways to weigh several objectives under which nothing must be promising."""


class StoppingRule:
    """Watches the forecasts of a search."""

    def __init__(self, forecaster: Forecaster, *, num_objectives: int, seed: int) -> None:
        self._forecaster = forecaster
        self._weightings = [
            None if num_objectives == 1 else draw_weights(num_objectives, f"{seed}-calm-{number}")
            for number in range(1 if num_objectives == 1 else _WEIGHTINGS)
        ]
        self._converged: dict[int, bool] = {}
        """Whether nothing was promising, by the number of records."""

    def forget(self) -> None:
        """Forgets what was made of other records."""
        self._converged.clear()

    def is_converged(self, history: History, forecast: Forecast) -> bool:
        """Whether no open plan promises a gain after these records.

        What others run now is not open; it may be again after the same records, so that answer is not kept.
        """
        if history.taken:
            return self._largest_chance(forecast)[0] < LEAST_CHANCE
        count = len(history.records)
        if count not in self._converged:
            self._converged[count] = self._largest_chance(forecast)[0] < LEAST_CHANCE
        return self._converged[count]

    def is_over(self, history: History, lessons: Lessons) -> bool:
        """Whether the forecasts before this one promised nothing either, and enough trials have run."""
        if history.counted < LEAST_TRIALS:
            return False
        for mark in history.marks[-CONVERGED_IN_A_ROW:-1]:
            if mark not in self._converged:
                # After a resume: what was thought then is thought again.
                before = history.until(mark, lessons)
                self.is_converged(before, self._forecaster.look(before))
            if not self._converged[mark]:
                return False
        return True

    def stop(self, forecast: Forecast) -> Stop:
        """What there is to say at the end."""
        chance, place = self._largest_chance(forecast)
        text = (
            f"no plan that did not run is predicted to gain more than {100 * MARGIN * forecast.noise:.1f} %, "
            "half the noise of a run"
        )
        if chance >= 0.005:
            name = forecast.effective[place].plan.describe()
            text += f"; the likeliest to, {name}, would with a probability of {100 * chance:.0f} %"
        return Stop(kind="converged", text=text)

    def _largest_chance(self, forecast: Forecast) -> tuple[float, int]:
        """The probability to gain of the open plan that is likeliest to, and its place."""
        largest, place = 0.0, 0
        for weights in self._weightings:
            cost, sd = forecast.scalar(weights)
            incumbent = forecast.incumbent(cost)
            if incumbent is None:
                return 1.0, 0
            margin = MARGIN * forecast.margin(weights)
            chance = chance_of_gain(cost, sd, float(cost[incumbent]), margin) * forecast.kept * forecast.is_open
            if chance.max(initial=0.0) > largest:
                largest, place = float(chance.max()), int(chance.argmax())
        return largest, place
