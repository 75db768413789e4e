"""One picture per family: how many times as fast as peers, and what share of the machine's limit (of models: of what
operations allow). And for sparse cases: their density against their speed-up over dense peers."""

from __future__ import annotations

from pathlib import Path

from .report import BEST, IDEAL, Report, Result, duration

INK, PALE, DEEP, WARM, GRID = "#22303c", "#b9d3e6", "#2b6ca3", "#d1495b", "#e3e7ea"
TODAY, LIMITS = "#8fa3b3", {"read": "#3a9188", "copy": "#6b5ca5", "matmul": "#c98b2b", IDEAL: "#6b5ca5"}


def _bare(axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _speed(axes, rows: list[Result]) -> None:
    """Over what users write today (the first peer) in pale, over the fastest peer in front of it; the bar as a tick."""
    for y, row in enumerate(rows):
        today, best = next(iter(row.ratios.values())), min(row.ratios.values())
        axes.barh(y, today - 1, left=1, height=0.72, color=PALE, zorder=2)
        axes.barh(y, best - 1, left=1, height=0.42, color=DEEP if best >= 1 else WARM, zorder=3)
        axes.text(max(today, best, 1) * 1.06, y, f"{best:.2f}x", va="center", fontsize=7.5, color=INK)
        required = [bar.required for name, bar in row.bars.items() if name == BEST or name in row.ratios]
        if IDEAL in row.bars:
            required.append(row.bars[IDEAL].required * row.forward.ideal)
        if required:
            axes.plot([max(required)] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=1.4, zorder=4)
    axes.axvline(1, color=INK, linewidth=1, zorder=5)
    axes.set_xscale("log", base=2)
    low = min(1, *(min(r.ratios.values()) for r in rows))
    high = max(2, *(max(next(iter(r.ratios.values())), min(r.ratios.values())) for r in rows))
    axes.set_xlim(low * 0.9, high * 1.6)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    models = all(row.forward for row in rows)
    title = "times as fast as the fastest peer (blue), as today's code (pale); tick: the bar"
    axes.set_title("times as fast as the model alone; tick: the bar" if models else title, fontsize=8.5)


def _reached(row: Result) -> tuple[float, str] | None:
    """(the share, of what) of the machine's limit, or of what a model's operations allow."""
    if row.share is not None:
        return row.share, row.limit
    return None if row.of_ideal is None else (row.of_ideal, IDEAL)


def _share(axes, rows: list[Result]) -> None:
    reached = [_reached(row) for row in rows]
    for y, (row, found) in enumerate(zip(rows, reached)):
        if found is None:
            continue
        share, kind = found
        axes.barh(y, 100 * share, height=0.6, color=LIMITS[kind], zorder=2)
        label = f"{100 * share:.0f} %  {duration(row.times['pyvtk'].median)}"
        axes.text(100 * share + 1.5, y, label, va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, max(120, *(130 * (found[0] if found else 0) for found in reached)))
    axes.axvline(100, color=INK, linewidth=1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %")
    kinds = [kind for kind in LIMITS if any(found and found[1] == kind for found in reached)]
    handles = [axes.barh(0, 0, color=LIMITS[kind]) for kind in kinds]
    axes.legend(
        handles, kinds, fontsize=7.5, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.5 / len(rows))
    )
    title = "share of the limit measured beside it"
    axes.set_title("share of the speed-up that operations allow" if kinds == [IDEAL] else title, fontsize=8.5)


def _break_even(figure, rows: list[Result]) -> None:
    """Each case by the share of pairs that it needs and its speed-up over dense attention, which below 1x is the better
    choice. On the line all time is spent on needed pairs; at the tick of a case, on those that its plan's blocks hold
    (kernels that skip keys inside blocks get above it)."""
    axes, key = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _bare(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    density = [row.pairs.needed / row.pairs.dense for row in rows]
    low, top = min(density) / 1.4, 1.6 * max(*(1 / d for d in density), *(r.over_dense for r in rows))
    bottom = min(0.4, *(row.over_dense / 1.3 for row in rows))
    axes.set(xscale="log", xlim=(low, 1.3), ylim=(bottom, top))
    axes.set_yscale("log", base=2)
    axes.axhspan(bottom, 1, color=WARM, alpha=0.07, linewidth=0)
    axes.axhline(1, color=INK, linewidth=1)
    axes.text(low * 1.05, bottom * 1.08, "dense attention wins", color=WARM, fontsize=8.5)
    lines = [*axes.plot([low, 1], [1 / low, 1], color=DEEP, linewidth=1.2, label="ideal: dense / needed pairs")]
    for number, (x, row) in enumerate(zip(density, rows), 1):
        y, ideal = row.over_dense, row.tile_ideal
        axes.plot([x, x], [y, ideal], color=PALE, linewidth=1, zorder=1)
        axes.plot(x, ideal, marker="_", markersize=9, color=LIMITS["matmul"], zorder=2)
        marker = "^" if "backward" in row.name else "s" if row.dtype == "bf16" else "o"
        axes.plot(x, y, marker=marker, markersize=6, color=DEEP if y >= 1 else WARM, zorder=3)
        axes.annotate(str(number), (x, y), (4, 3), textcoords="offset points", fontsize=7, color=INK)
    for marker, color, label in (
        ("_", LIMITS["matmul"], "ideal of tiles: dense / visited pairs"),
        ("o", DEEP, "forward, fp32"),
        ("s", DEEP, "forward, bf16"),
        ("^", DEEP, "forward and backward"),
    ):
        lines += axes.plot([], [], marker=marker, color=color, linestyle="", label=label)
    axes.legend(handles=lines, fontsize=7.5, frameon=False, loc="upper right")
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axes.set_xlabel("share of the pairs of dense (where causal: causal) attention that are needed", fontsize=8)
    axes.set_ylabel("times as fast as dense attention", fontsize=8)
    names = [f"{i:2d}  {row.over_dense:5.2f}x  {row.name}  {row.dtype}" for i, row in enumerate(rows, 1)]
    key.axis("off")
    key.text(0, 1, "\n".join(names), va="top", fontsize=7, color=INK, family="monospace", linespacing=1.5)


def _signed(figure, title: str, facts: dict) -> None:
    figure.suptitle(title, fontsize=13, color=INK, x=0.01, ha="left", fontweight="bold")
    device = "" if facts["device"] == "cpu" else f"{facts['device']}, "
    figure.supxlabel(
        f"{device}{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} thread(s), torch {facts['torch']}, "
        f"pyvtk {facts['pyvtk']} ({facts['commit']}), {facts['date'][:10]}",
        fontsize=7.5,
        color=TODAY,
    )


def draw(report: Report, folder: Path) -> list[Path]:
    """Write ``<family>.png`` into the folder for every family with numbers, and ``<family>_break_even.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for family in dict.fromkeys(r.family for r in report.results):
        rows = [r for r in report.results if r.family == family and r.error is None and r.ratios]
        if not rows:
            continue
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12.5, 1.5 + 0.29 * len(rows)), sharey=True, width_ratios=(1.5, 1), layout="constrained"
        )
        for axes in (left, right):
            _bare(axes)
        _speed(left, rows)
        _share(right, rows)
        left.set_yticks(range(len(rows)), [f"{r.name}  {r.dtype}" for r in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        _signed(figure, f"pyvtk {family}", report.machine)
        path = folder / f"{family}.png"
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
        written.append(path)
        sparse = sorted((r for r in rows if r.pairs and r.dense), key=lambda r: r.pairs.needed / r.pairs.dense)
        if sparse:
            figure = plt.figure(figsize=(13, max(5.5, 1.5 + 0.16 * len(sparse))), layout="constrained")
            _break_even(figure, sparse)
            _signed(figure, f"pyvtk {family}: where it pays", report.machine)
            path = folder / f"{family}_break_even.png"
            figure.savefig(path, dpi=150, facecolor="white")
            plt.close(figure)
            written.append(path)
    return written
