"""How long a step takes, learned from the steps that were taken: what chunks, cache and speculation are decided by.

A step that decodes `n` tokens with `c` cells in memory takes about `fixed + per_token * n + per_pair * n * c` seconds
(weights are read once, each token is computed, and attends to every cell of unified memory). The three are fitted by
recursive least squares with exponential forgetting (Ljung, "System Identification", ch. 11). Tokens of prompts are
cheaper, being computed together, and have a price of their own. What a cell costs drowns in the noise of most machines
where the number of streams hardly changes, so it is kept near what the model's shape lets expect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_FORGETTING = 0.98
_PRIOR_VARIANCE = 1e4
_VARIANCE_CAP = 1e6
_OUTLIER = 4.0  # a step this many times slower than expected says more about the machine's other work
_KILO = 1e-3  # cells are counted in thousands inside, which keeps the fit well conditioned
_SMOOTHING = 0.3
_EAGER, _SELDOM = 32, 8
_LEAST_PREFILL = 8  # tokens; fewer say nothing of the price of a chunk
_BEYOND_EXPECTED = 8.0

_Row = list[float]


@dataclass(slots=True)
class _Fit:
    """Weights of a linear model, all at least 0 where they are read."""

    weights: _Row = field(default_factory=lambda: [0.0, 0.0, 0.0])
    covariance: list[_Row] = field(
        default_factory=lambda: [[_PRIOR_VARIANCE if i == j else 0.0 for j in range(3)] for i in range(3)]
    )
    count: int = 0

    def predict(self, x: _Row) -> float:
        w = self.weights
        return max(w[0] * x[0] + w[1] * x[1] + w[2] * x[2], 0.0)

    def learn(self, x: _Row, y: float) -> None:
        if self.count > 8:
            expected = self.predict(x)
            if expected > 0:
                y = min(y, _OUTLIER * expected)
        p = self.covariance
        px = [p[i][0] * x[0] + p[i][1] * x[1] + p[i][2] * x[2] for i in range(3)]
        scale = _FORGETTING + px[0] * x[0] + px[1] * x[1] + px[2] * x[2]
        w = self.weights
        error = y - (w[0] * x[0] + w[1] * x[1] + w[2] * x[2])
        self.weights = [w[i] + px[i] * error / scale for i in range(3)]
        grown = [[(p[i][j] - px[i] * px[j] / scale) / _FORGETTING for j in range(3)] for i in range(3)]
        # what is not observed for long would otherwise be forgotten without bound ("wind-up")
        if max(grown[0][0], grown[1][1], grown[2][2]) < _VARIANCE_CAP:
            self.covariance = grown
        self.count += 1


@dataclass(slots=True)
class StepTime:
    """Learns from every step; all times in seconds. Every answer is finite and at least 0.

    `pair_share` is what one more cell in memory is expected to cost a token, as a share of what computing the token
    takes alone; 0 where nothing is known of the model.
    """

    pair_share: float = 0.0
    prefill_token_s: float | None = None
    prefill_rate: float = 0.0  # tokens a second, over the last chunks; 0 where none was read yet
    decode_rate: float = 0.0  # steps a second, over the last ones that only decoded; 0 where none did
    _decode: _Fit = field(default_factory=_Fit)
    _decoded: int = 0
    _steps: int = 0

    def observe(self, *, decoded: int, read: int, cells: int, seconds: float) -> None:
        """A step decoded `decoded` tokens and read `read` tokens of prompts, with `cells` in memory."""
        seconds = max(seconds, 1e-7)
        if decoded and not read:
            self._steps += 1
            # the same step over and over teaches nothing new, and learning has its price
            if decoded != self._decoded or self._decode.count < _EAGER or not self._steps % _SELDOM:
                self._decode.learn(_features(decoded, cells), seconds)
            self._decoded = decoded
            self.decode_rate = _smooth(self.decode_rate, 1.0 / seconds, 0.1)
        elif read >= _LEAST_PREFILL:
            rest = seconds - (self.decode_s(decoded, cells) or 0.0 if decoded else 0.0)
            price = max(rest, 0.1 * seconds) / read
            old = self.prefill_token_s
            self.prefill_token_s = price if old is None else _smooth(old, price, _SMOOTHING)
            self.prefill_rate = 1.0 / max(self.prefill_token_s, 1e-9)

    def decode_s(self, tokens: int, cells: int) -> float | None:
        """What decoding so many tokens takes; None before anything was measured."""
        return self._decode.predict(_features(tokens, cells)) if self._decode.count else None

    @property
    def pair_s(self) -> float:
        """What one decoded token pays for one cell in memory."""
        measured = max(self._decode.weights[2], 0.0) * _KILO if self._decode.count > 8 else 0.0
        expected = self.pair_share * (self.decode_s(1, 0) or 0.0)
        return min(max(measured, expected), _BEYOND_EXPECTED * expected) if expected > 0 else measured

    def chunk(self, *, decoding: int, cells: int, target_s: float, most: int) -> int:
        """How many tokens of prompts go into a step beside `decoding` streams, so that it takes about `target_s`.

        A step that is long without them may grow by half: prompts must be read on slow machines too. At least 1.
        """
        price, decode_s = self.prefill_token_s, self.decode_s(decoding, cells)
        if price is None or decode_s is None:
            return max(1, min(most, 64))
        return max(1, min(most, int(max(target_s - decode_s, 0.5 * decode_s) / max(price, 1e-9))))


def _features(tokens: int, cells: int) -> _Row:
    return [1.0, float(tokens), tokens * cells * _KILO]


def _smooth(old: float, new: float, weight: float) -> float:
    return new if not old else old + weight * (new - old)
