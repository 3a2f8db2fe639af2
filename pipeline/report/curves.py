"""The curves of `dpar-cli patches stats` as a PNG: patches per image over the threshold, one curve per maximum length."""

from __future__ import annotations

from pathlib import Path

from pipeline.figures import new_figure, save_figure
from stages.tools.patch_stats import PatchStats


def draw_curves(stats: PatchStats, path: Path) -> None:
    """Draw mean patches per image with the 5 to 95 per cent band, and the mean length on the right-hand scale."""
    figure, axes = new_figure(8, 4.8)
    for number, max_length in enumerate(dict.fromkeys(cell.max_length for cell in stats.cells)):
        cells = sorted((cell for cell in stats.cells if cell.max_length == max_length), key=lambda cell: cell.threshold)
        over = [cell.threshold for cell in cells]
        name = "no maximum" if max_length is None else f"at most {max_length} token{'s' if max_length > 1 else ''}"
        axes.plot(over, [cell.patches for cell in cells], marker="o", markersize=4, color=f"C{number}", label=name)
        axes.fill_between(over, [c.low for c in cells], [c.high for c in cells], color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set_xlabel("threshold, nats")
    axes.set_ylabel(f"patches per image of {stats.tokens} tokens")
    axes.set_ylim(0, stats.tokens * 1.04)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="patch length")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{stats.maps:,} views; bands: 5 to 95 % of the images", loc="left", fontsize=10)
    lengths = axes.secondary_yaxis("right", functions=(lambda p: p, lambda p: p))
    longest = 1.5 * max(cell.mean_length for cell in stats.cells)
    ticks = [length for length in (1, 1.25, 1.5, 2, 3, 4, 8) if length <= longest]
    lengths.set_yticks([stats.tokens / length for length in ticks], [f"{length:g}" for length in ticks])
    lengths.set_ylabel("mean patch length, tokens")
    save_figure(figure, path)
