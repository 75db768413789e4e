"""One picture per family: how many times as fast as peers, and what share of the machine's limit."""

from __future__ import annotations

from pathlib import Path

from .harness import BEST, Report, Result, duration

INK, PALE, DEEP, WARM, GRID = "#22303c", "#b9d3e6", "#2b6ca3", "#d1495b", "#e3e7ea"
TODAY, LIMITS = "#8fa3b3", {"read": "#3a9188", "copy": "#6b5ca5", "matmul": "#c98b2b"}


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
        if required:
            axes.plot([max(required)] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=1.4, zorder=4)
    axes.axvline(1, color=INK, linewidth=1, zorder=5)
    axes.set_xscale("log", base=2)
    low = min(1, *(min(r.ratios.values()) for r in rows))
    high = max(2, *(max(next(iter(r.ratios.values())), min(r.ratios.values())) for r in rows))
    axes.set_xlim(low * 0.9, high * 1.6)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.set_title("times as fast as the fastest peer (blue), as today's code (pale); tick: the bar", fontsize=8.5)


def _share(axes, rows: list[Result]) -> None:
    for y, row in enumerate(rows):
        if row.share is None:
            continue
        axes.barh(y, 100 * row.share, height=0.6, color=LIMITS[row.limit], zorder=2)
        label = f"{100 * row.share:.0f} %  {duration(row.times['pyvtk'].median)}"
        axes.text(100 * row.share + 1.5, y, label, va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, max(120, *(130 * (r.share or 0) for r in rows)))
    axes.axvline(100, color=INK, linewidth=1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %")
    kinds = [kind for kind in LIMITS if any(r.limit == kind for r in rows)]
    handles = [axes.barh(0, 0, color=LIMITS[kind]) for kind in kinds]
    axes.legend(
        handles, kinds, fontsize=7.5, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.5 / len(rows))
    )
    axes.set_title("share of the limit measured beside it", fontsize=8.5)


def draw(report: Report, folder: Path) -> list[Path]:
    """Write ``<family>.png`` into the folder for every family with numbers."""
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
        facts = report.machine
        figure.suptitle(f"pyvtk {family}", fontsize=13, color=INK, x=0.01, ha="left", fontweight="bold")
        figure.supxlabel(
            f"{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} thread, torch {facts['torch']}, "
            f"pyvtk {facts['pyvtk']} ({facts['commit']}), {facts['date'][:10]}",
            fontsize=7.5,
            color=TODAY,
        )
        path = folder / f"{family}.png"
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
        written.append(path)
    return written
