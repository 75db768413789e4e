"""What a run of the benchmarks found: as values, as JSON, as text; and the machine that it was found on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import pyvtk
from pyvtk._measure import Timing

OURS = "pyvtk"
BEST = "best"  # in bars: the fastest peer of the row
SHARE = "limit"  # in bars: share of the machine's limit
MEMORY = "memory"  # in bars: extra memory as a share of the first peer's
DENSE = "dense"  # in bars: the fastest peer that computes every pair
TILE = "tile"  # in bars: share of the speed-up over DENSE that the visited pairs allow
TIME = "time"  # in bars: seconds
IDEAL = "ideal"  # in bars: share of the speed-up over DENSE that the operations of a model allow
OWN = "own"  # in bars: share of a model's time that is spent in operators of pyvtk
RESERVED = (OURS, BEST, SHARE, MEMORY, DENSE, TILE, TIME, IDEAL, OWN)
UPPER = (MEMORY, TIME, OWN)  # the less the better
LOST = "lost: "  # how the error of a case begins that ended its process, and that --resume does not try again
BEGUN = "begun"  # the error of a case for as long as it runs


@dataclass
class Pairs:
    """Pairs of a query and a key, per head: what a case needs, what its tiles visit, what dense peers compute."""

    needed: int
    visited: int
    dense: int


@dataclass
class Forward:
    """A forward pass of a whole model, from which a method spares something.

    Attributes:
        ideal: the speed-up over the unmodified model if all time went into its decoder's products and attention, at one
            rate; None where operations say nothing, since weights come from memory.
        own: share of its time that is spent in operators of pyvtk.
        attention: share of the unmodified model's time that is spent in attention.
        cache, dense_cache: bytes of the KV cache that is held, and of the unmodified model's.
    """

    ideal: float | None
    own: float
    attention: float
    cache: int
    dense_cache: int


@dataclass
class Bar:
    required: float
    reached: float
    met: bool


@dataclass
class Result:
    """Everything that is known about one case; plain values only, so that it survives JSON."""

    family: str
    name: str
    dtype: str
    times: dict[str, Timing] = field(default_factory=dict)
    limit: str | None = None
    limit_time: float | None = None  # seconds the limit needs for this case's amount
    amount: float | None = None  # bytes or floating-point operations
    memory: dict[str, int] = field(default_factory=dict)  # provider -> extra bytes at the peak
    bars: dict[str, Bar] = field(default_factory=dict)
    unjudged: list[str] = field(default_factory=list)  # bars over what was not measured
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it did not run
    dense: list[str] = field(default_factory=list)  # peers that compute every pair
    pairs: Pairs | None = None
    forward: Forward | None = None
    cpu_time: bool = False  # times are those that the process had a core for
    launched: list[str] = field(default_factory=list)  # timed as launched by the host, not as CUDA graphs
    error: str | None = None  # why there are no numbers

    @property
    def of(self) -> tuple[str, str, str]:
        """What the case is found by."""
        return self.family, self.name, self.dtype

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long each peer takes."""
        return {n: t.median / self.times[OURS].median for n, t in self.times.items() if n != OURS}

    @property
    def share(self) -> float | None:
        """Share of the limit's speed that is reached."""
        return None if self.limit_time is None else self.limit_time / self.times[OURS].median

    @property
    def over_dense(self) -> float | None:
        """How many times as long the fastest dense peer takes."""
        return min((self.ratios[name] for name in self.dense), default=None)

    @property
    def tile_ideal(self) -> float | None:
        """The same if every visited pair took as long as one of a dense peer's."""
        return None if self.pairs is None else self.pairs.dense / self.pairs.visited

    @property
    def of_ideal(self) -> float | None:
        """Share that is reached of the speed-up over dense peers that the operations of a model allow."""
        if self.forward is None or self.forward.ideal is None or self.over_dense is None:
            return None
        return self.over_dense / self.forward.ideal


@dataclass
class Report:
    machine: dict
    results: list[Result]

    def to_json(self) -> str:
        return json.dumps({"schema": 1, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        raw = json.loads(text)
        results = []
        for row in raw["results"]:
            row["times"] = {name: Timing(**t) for name, t in row["times"].items()}
            row["bars"] = {name: Bar(**b) for name, b in row["bars"].items()}
            row["pairs"] = Pairs(**row["pairs"]) if row.get("pairs") else None
            row["forward"] = Forward(**row["forward"]) if row.get("forward") else None
            results.append(Result(**row))
        return Report(raw["machine"], results)


def write(path: Path, report: Report) -> None:
    """Whole or not at all: what ends the process meanwhile must not take the other results with it."""
    part = path.with_name(path.name + ".part")
    part.write_text(report.to_json())
    os.replace(part, path)


def not_again(results: list[Result]) -> dict[tuple[str, str, str], Result]:
    """Those of another run's results that are not measured again: the good ones, and what ended its process. That is
    another try away from ending the next one too, and all behind it would never be reached."""
    found = {}
    for result in results:
        if result.error == BEGUN:
            result = dataclasses.replace(result, error=LOST + "the process ended while it ran")
        if result.error is None or result.error.startswith(LOST):
            found[result.of] = result
    return found


# ---- the machine


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def commit_of(root: Path) -> str | None:
    """The commit that is measured, in ten digits, with a + behind it if the tree has changes. The environment variable
    PYVTK_COMMIT is believed before git: .ci/gpu sets it for trees that travelled without their history, or with an old
    one, once it has compared every file."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        except FileNotFoundError:  # git is not installed
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    told = re.sub("^([0-9a-f]{10})[0-9a-f]*", r"\1", os.environ.get("PYVTK_COMMIT", "").strip())
    # git would look above the root, and find a history that is not ours
    known = git("rev-parse", "--short=10", "HEAD") if (root / ".git").exists() else ""
    if told and known and told[:10] != known:
        print(f"pyvtk bench: the checkout is at {known}, but PYVTK_COMMIT is {told}: taken as {told}", file=sys.stderr)
    if known and git("status", "--porcelain", "--untracked-files=no"):
        known += "+"
    return told or known or None


def machine(command: str, device: str = "cpu", floor: float | None = None) -> dict:
    """Where and when the numbers were taken. ``load`` is the load average at the start: above 0.5, expect noise;
    ``floor``: seconds of the replay of one tiny kernel, about what is in every number of a GPU."""
    facts = pyvtk.info()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "instruction_set": facts["instruction_set"],
        "cache": cache_bytes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": facts["triton"],
        "cuda": torch.version.cuda,
        "pyvtk": facts["pyvtk"],
        "python": platform.python_version(),
        "floor": floor,
        "commit": commit_of(Path(__file__).resolve().parent.parent),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


# ---- showing


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(count: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def _limit_cell(result: Result) -> str:
    if result.share is None:
        return "-"
    rate = result.amount / result.times[OURS].median
    unit = "GFLOP/s" if result.limit == "matmul" else "GB/s"
    return f"{100 * result.share:3.0f} % of {result.limit} ({rate / 1e9:.3g} {unit})"


def _forward_cell(result: Result) -> str:
    forward, parts = result.forward, []
    if result.of_ideal is not None:
        parts.append(f"operations allow {forward.ideal:.2f}x, reached {result.of_ideal:.0%}")
    parts.append(f"pyvtk's own {forward.own:.2%}, attention of dense {forward.attention:.1%}")
    parts.append(f"cache {size(forward.cache)} of {size(forward.dense_cache)}")
    return "; ".join([*parts, *(["CPU time"] if result.cpu_time else [])])


def _bar_cell(name: str, bar: Bar) -> str:
    sign = "✓" if bar.met else "✗"
    if name == SHARE:
        return f"{sign} limit ≥ {100 * bar.required:.0f} %"
    if name == MEMORY:
        return f"{sign} memory ≤ {100 * bar.required:.0f} %"
    if name == TIME:
        return f"{sign} ≤ {duration(bar.required)}"
    if name == TILE:
        return f"{sign} tile-ideal ≥ {100 * bar.required:.0f} %"
    if name == IDEAL:
        return f"{sign} ideal ≥ {100 * bar.required:.0f} %"
    if name == OWN:
        return f"{sign} own ≤ {100 * bar.required:.1f} %"
    return f"{sign} {name} ≥ {bar.required:g}x"


def table(results: list[Result]) -> str:
    """Aligned text, one block per family."""
    blocks = []
    for family in dict.fromkeys(r.family for r in results):
        rows = [("case", "dtype", "pyvtk", "20-80 %", "limit", "peers: times as long", "bars")]
        for r in (r for r in results if r.family == family):
            if r.error:
                rows.append((r.name, r.dtype, "RED", "-", "-", f"no numbers: {r.error}", ""))
                continue
            ours = r.times[OURS]
            peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in r.ratios.items())
            bars = ", ".join([*(_bar_cell(name, bar) for name, bar in r.bars.items()), *(f"? {n}" for n in r.unjudged)])
            spread = f"{duration(ours.low)} - {duration(ours.high)}"
            rows.append((r.name, r.dtype, duration(ours.median), spread, _limit_cell(r), peers, bars))
            if r.memory:
                used = ", ".join(f"{name} {size(n)}" for name, n in r.memory.items())
                rows.append(("", "", "", "", "", f"extra memory: {used}", ""))
            if r.pairs:
                share = r.pairs.needed / r.pairs.dense
                ideal = f"needs {share:.1%} of the dense pairs, visits {1 / r.tile_ideal:.1%}"
                rows.append(("", "", "", "", "", ideal, ""))
            if r.forward:
                rows.append(("", "", "", "", "", _forward_cell(r), ""))
            if r.launched:
                rows.append(("", "", "", "", "", f"as launched, not as CUDA graphs: {', '.join(r.launched)}", ""))
            if r.absent:
                of = {why: [name for name, other in r.absent.items() if other == why] for why in r.absent.values()}
                reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in of.items())
                rows.append(("", "", "", "", "", f"absent: {reasons}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        blocks.append("\n".join([family, *("  " + line for line in lines)]))
    return "\n\n".join(blocks)


def summary(results: list[Result]) -> str:
    bars = [bar for r in results for bar in r.bars.values()]
    unjudged = sum(len(r.unjudged) for r in results)
    red = sum(r.error is not None for r in results)
    text = f"{len(results)} cases, {sum(bar.met for bar in bars)} of {len(bars)} bars met"
    text += f", {unjudged} not judged (?)" if unjudged else ""
    return text + (f", {red} RED (no number)" if red else ", every result checked")


def header(facts: dict) -> str:
    lines = (
        *(["{device}, beside"] if facts["device"] != "cpu" else []),
        "{cpu}, {instruction_set}, {threads} thread(s), last-level cache {cache}, load {load}",
        *(["one tiny kernel, replayed as all are, takes {floor}"] if facts["floor"] else []),
        "pyvtk {pyvtk} at commit {commit}, torch {torch}, Python {python}, {date}",
        "{command}",
    )
    floor = duration(facts["floor"] or 0)
    return "\n".join(lines).format(**{**facts, "cache": size(facts["cache"]), "floor": floor})
