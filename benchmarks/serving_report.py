"""What `serving.py` measured, as Markdown tables and the bars it must meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from figures import Bar, Mean, geometric_mean, percentile, verdict

LLAMA_SERVER, RUNNER, WRAPPER = "llama-server", "runner", "Llama"


@dataclass(frozen=True, order=True)
class Cell:
    """So many streams, greedy or sampled."""

    streams: int
    sampled: bool

    def __str__(self) -> str:
        return f"{self.streams} {'sampled' if self.sampled else 'greedy'}"

    @property
    def tokens(self) -> int:
        """Tokens of each stream: fewer where there are many, so that every cell has its turn in a run's time."""
        return {16: 48, 32: 32}.get(self.streams, 64)


@dataclass
class Measured:
    """All that was measured of one server in one cell. Times are seconds."""

    rates: list[float] = field(default_factory=list)  # tokens/s, one a round
    firsts_s: list[float] = field(default_factory=list)  # one a request
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    idle_cpu_s: float = 0.0  # of the other server meanwhile
    wall_s: float = 0.0


Results = Mapping[tuple[Cell, str], Measured]


def report(cells: Sequence[Cell], found: Results, peaks: Mapping[str, int]) -> int:
    """Prints tables and bars; returns an exit status, 1 if a bar was missed. `peaks` are bytes by server."""
    ratios = {cell: _ratios(found, cell) for cell in cells}
    means = {cell: geometric_mean([values]) for cell, values in ratios.items()}
    overall = geometric_mean(list(ratios.values()))
    _print_rates(cells, found, means, overall)
    _print_latencies(cells, found)
    _print_costs(cells, found)
    _print_memory(peaks)
    both = (LLAMA_SERVER, RUNNER)
    idle = max(found[cell, name].idle_cpu_s / found[cell, name].wall_s for cell in cells for name in both)
    print(f"\nThe server that was not asked used at most {idle:.1%} of a core meanwhile.")
    return verdict(_bars(cells, found, peaks, means, overall))


def _ratios(found: Results, cell: Cell) -> list[float]:
    pairs = zip(found[cell, RUNNER].rates, found[cell, LLAMA_SERVER].rates, strict=True)
    return [ours / theirs for ours, theirs in pairs]


def _bars(
    cells: Sequence[Cell], found: Results, peaks: Mapping[str, int], means: Mapping[Cell, Mean], overall: Mean
) -> list[Bar]:
    worst = min(cells, key=lambda cell: means[cell].low)
    firsts = {cell: _first_p99(found, cell, RUNNER) / _first_p99(found, cell, LLAMA_SERVER) for cell in cells}
    later = ", ".join(f"{cell} ({share:.2f} of it)" for cell, share in firsts.items() if share > 1.0)
    memory = peaks[RUNNER] / peaks[LLAMA_SERVER]
    return [
        Bar(f"geometric mean of the ratios at least 1.00 (aim 1.10): {overall}", overall.value >= 1.0),
        Bar(f"each cell's lower bound at least 0.97: {means[worst].low:.3f} at {worst}", means[worst].low >= 0.97),
        Bar(f"TTFT p99 no more than llama-server's: {f'more at {later}' if later else 'in every cell'}", not later),
        Bar(f"peak memory no more than llama-server's: {memory:.2f} of it", memory <= 1.0),
    ]


def _first_p99(found: Results, cell: Cell, name: str) -> float:
    return percentile(found[cell, name].firsts_s, 0.99)


def _print_rates(cells: Sequence[Cell], found: Results, means: Mapping[Cell, Mean], overall: Mean) -> None:
    rows = []
    for cell in cells:
        alone = found.get((cell, WRAPPER))
        rates = [f"{percentile(found[cell, name].rates, 0.5):.1f}" for name in (LLAMA_SERVER, RUNNER)]
        rows.append([str(cell), *rates, f"{percentile(alone.rates, 0.5):.1f}" if alone else "-", str(means[cell])])
    rows.append(["all", "", "", "", str(overall)])
    _print_table(["tokens/s", LLAMA_SERVER, RUNNER, WRAPPER, "runner / llama-server (95%)"], rows)
    print("\nRates are medians over the pairs, ratios geometric means over them with a bootstrap interval.")


def _print_latencies(cells: Sequence[Cell], found: Results) -> None:
    names = (LLAMA_SERVER, RUNNER, WRAPPER)
    header = ["milliseconds"]
    for what in ("TTFT p50", "TTFT p99", "gap p99"):
        header += [f"{what} {LLAMA_SERVER}", RUNNER, WRAPPER]
    rows = []
    for cell in cells:
        row = [str(cell)]
        for what, share in (("firsts_s", 0.5), ("firsts_s", 0.99), ("gaps_s", 0.99)):
            of_each = [getattr(found[cell, name], what) if (cell, name) in found else [] for name in names]
            row += [_milliseconds(percentile(values, share)) if values else "-" for values in of_each]
        rows.append(row)
    print()
    _print_table(header, rows)
    least = min(len(found[cell, RUNNER].firsts_s) for cell in cells)
    print(f"\nTTFT over {least:,} requests a cell.")


def _print_costs(cells: Sequence[Cell], found: Results) -> None:
    rows = []
    for cell in cells:
        both = [found[cell, name] for name in (LLAMA_SERVER, RUNNER)]
        clients = [f"{one.client_cpu_s / one.tokens * 1e6:,.0f}" for one in both]
        rows.append([str(cell), *clients, *(f"{one.server_cpu_s / one.tokens * 1e3:.2f}" for one in both)])
    print()
    header = ["CPU of a token", "client of llama-server, us", "of the runner, us", "llama-server, ms", "runner, ms"]
    _print_table(header, rows)


def _print_memory(peaks: Mapping[str, int]) -> None:
    shown = ", ".join(f"{name} {peak / 2**20:,.0f} MiB" for name, peak in peaks.items())
    print(f"\nPeak resident memory (VmHWM, which counts the mapped model file in each process alike): {shown}.")
    if WRAPPER in peaks:
        print(f"{WRAPPER} has KV memory for one stream, the servers for all.")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"
