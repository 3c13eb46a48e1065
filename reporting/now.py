"""What the live page says of runs and sweeps under way, as blocks."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Sequence

from crucible.console import lasting
from reporting.page import Block, Grid, Heading, Items, Picture, Text
from reporting.plots import BASELINE_COLOUR, COLOURS, Plot
from reporting.progress import AtWork, Look, Progress

LISTED = 30  # rows of runs at work, and of failures


def now_blocks(progress: Progress) -> Iterator[Block]:
    """What runs where, how far it is, what has failed, when it will end, and the next look."""
    yield Heading("Now", 2)
    yield Text(_in_a_line(progress), notice=True)
    if progress.running:
        yield _running(progress.running)
        if len(progress.running) > LISTED:
            yield Text(f"And {len(progress.running) - LISTED} more.")
        for data in dict.fromkeys(one.data for one in progress.running):
            try:
                plot = _curves(data, [one for one in progress.running if one.data == data])
            except (ArithmeticError, ValueError):  # of numbers that went anywhere; the page goes without
                plot = None
            if plot:
                yield Picture(plot, "")
    for look in progress.looks:
        yield from _look(look)
    if progress.failed:
        yield Heading("Failed", 3)
        rows = [
            [(name, name.lower()), (one.status, one.status), (one.reason, ""), (str(one.path), str(one.path))]
            for one, name in progress.failed[:LISTED]
        ]
        yield Grid(
            ["run", "status", "reason", "folder"], rows, frozenset({"run", "status", "reason", "folder"})
        )
        if len(progress.failed) > LISTED:
            yield Text(f"And {len(progress.failed) - LISTED} more.")


def clock(at: float, now: float) -> str:
    """A time of day on this machine; with the day where it is another one."""
    same = time.localtime(at)[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M" if same else "%a %d %b, %H:%M", time.localtime(at))


def _in_a_line(progress: Progress) -> str:
    running, waiting, failed = len(progress.running), len(progress.waiting), len(progress.failed)
    parts = [f"{running} at work" if running else "nothing is at work", f"{progress.counted} ended"]
    parts += [f"{waiting} to come"] if waiting else []
    parts += [f"{failed} failed or lost"] if failed else []
    text = f"Runs: {', '.join(parts)}."
    if running or waiting:
        to_look = any(look.seeds for look in progress.looks)
        known = not math.isnan(progress.end)
        if known:
            what = "The next look is reached" if to_look else "All will have ended"
            at = clock(progress.end, progress.time)
            several = f", {progress.workers} at once" if waiting and progress.workers > 1 else ""
            text += f" {what} about {at}{several}, as runs of their kind take."
        else:
            what = "the next look is reached" if to_look else "all will have ended"
            text += f" When {what} is not known until one of each kind has been measured."
    elif progress.sweeps:
        text += " A sweep is at work between two runs."
    return text


def _running(running: Sequence[AtWork]) -> Grid:
    several = len({one.data for one in running}) > 1
    shown = _score(running)
    head = [
        "run",
        *(["data"] if several else []),
        "progress",
        *([shown] if shown else []),
        "left",
        "images/s",
        "since",
    ]
    words = frozenset({"run", "data", "where", "device"})
    rows = []
    for one in running[:LISTED]:
        name = f"{one.arm}, seed {one.seed}"
        of = "" if math.isnan(one.of) else f" of {one.of:g}"
        last = [*one.curves.get(shown, {}).values()][-1:] or [math.nan]
        row: list[tuple[str, float | str]] = [
            (name, name.lower()),
            *([(one.data, one.data)] if several else []),
        ]
        row.append((f"{one.epochs}{of} epochs", one.share))
        row += [("-" if math.isnan(last[0]) else _formatted(shown, last[0]), last[0])] if shown else []
        row += [
            (lasting(one.left), one.left),
            ("-" if math.isnan(one.images_per_s) else f"{one.images_per_s:,.0f}", one.images_per_s),
        ]
        row += [(clock(one.since, time.time()), one.since), (one.where, one.where), (one.device, one.device)]
        rows.append(row)
    return Grid([*head, "where", "device"], rows, words)


_SCORES = ("val/acc", "val/mae", "val/loss", "train/acc", "train/loss")


def _score(running: Sequence[AtWork]) -> str:
    """The column of metrics.csv that says how they do."""
    return next((name for name in _SCORES if any(name in one.curves for one in running)), "")


def _formatted(name: str, value: float) -> str:
    return f"{100 * value:.2f}%" if name.endswith("/acc") else f"{value:.4g}"


def _look(look: Look) -> Iterator[Block]:
    sweep = look.sweep
    assert sweep.decides is not None
    yield Heading("Next look", 3)
    ended = [f"{arm}: {step.found}" for arm, step in look.steps.items() if step.ended]
    settled = f" Ended: {'; '.join(ended)}." if ended else ""
    if not look.seeds:
        yield Text(
            f"No arm asks for more seeds; looks were planned at {', '.join(map(str, sweep.planned))}.{settled}"
        )
        return
    of, metric = len(sweep.planned), sweep.decides.metric
    yield Text(
        f"Look {look.number} of {of} is at {look.seeds} seeds, by {metric}: {look.ended} of its {look.asked} runs have "
        f"ended; open are {', '.join(look.wanted)}.{settled}"
    )
    chances = [
        f"{arm}: chance of a decision at a later look {step.chance:.0%}"
        for arm, step in look.steps.items()
        if not step.ended and step.look and not math.isnan(step.chance)
    ]
    if chances:
        yield Items(chances)


# A picture of the curves so far: text and lines as those of the report's plots, without the second that they take

_WIDE, _HIGH = 403, 190  # points, as the plots'
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 30


def _curves(data: str, running: Sequence[AtWork]) -> Plot | None:
    name = _score(running)
    scale = 100.0 if name.endswith("/acc") else 1.0
    lines = {
        f"{one.arm}, seed {one.seed}": {e: scale * v for e, v in one.curves.get(name, {}).items()}
        for one in running
    }
    lines = {n: {e: v for e, v in of.items() if math.isfinite(v)} for n, of in lines.items()}
    lines = {n: of for n, of in lines.items() if of}
    if not lines:
        return None
    shown = dict(list(lines.items())[: len(COLOURS)])
    values = [v for of in lines.values() for v in of.values()]
    low, high = min(values), max(values)
    pad = 0.06 * ((high - low) or abs(low)) or 0.5
    low, high = low - pad, high + pad
    if not 0 < high - low < math.inf:  # no axis has room for such numbers
        return None
    last = max(e for of in lines.values() for e in of)
    ends = [one.of for one in running if not math.isnan(one.of)]
    until = max([2, last + 1, *ends])

    def x(epoch: float) -> float:
        return _LEFT + epoch / (until - 1) * (_WIDE - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HIGH - _TOP - _BOTTOM)

    whole = _HIGH + 14 * -(-len(shown) // 2)
    right, bottom = _WIDE - _RIGHT, _HIGH - _BOTTOM
    parts = [
        f'<svg role="img" aria-label="Curves so far" viewBox="0 0 {_WIDE} {whole}" font-size="9.5" fill="currentColor">'
    ]
    for tick in _ticks(low, high):
        parts.append(_line(f"M{_LEFT} {y(tick):.1f}H{right}", BASELINE_COLOUR, 0.6, 0.3))
        parts.append(_text(_LEFT - 5, y(tick) + 3, f"{tick:g}", "end"))
    parts += [_text(x(t - 1), bottom + 12, f"{t:g}", "middle") for t in _ticks(1, until) if t == int(t)]
    parts.append(_line(f"M{_LEFT} {_TOP}V{bottom}H{right}", "currentColor", 0.8))
    parts.append(_text((_LEFT + right) / 2, _HIGH - 6, "epoch", "middle"))
    turned = f' transform="rotate(-90 10 {(_TOP + bottom) / 2})"'
    parts.append(_text(10, (_TOP + bottom) / 2, f"{name}, %" if scale == 100 else name, "middle", turned))
    for i, ((label, of), colour) in enumerate(zip(shown.items(), COLOURS, strict=False)):
        points = [f"{x(e):.1f} {y(v):.1f}" for e, v in sorted(of.items())]
        parts.append(_line("M" + "L".join(points), colour, 1.5))
        if len(points) == 1:  # no line yet
            left, top = points[0].split(" ")
            parts.append(f'<circle cx="{left}" cy="{top}" r="2" fill="{colour}"/>')
        at, row = _LEFT + (i % 2) * (_WIDE - _LEFT) // 2, _HIGH + 8 + 14 * (i // 2)
        parts.append(_line(f"M{at} {row - 3}h14", colour, 1.5))
        parts.append(_text(at + 19, row, label if len(label) <= 30 else f"{label[:29]}…", "start"))
    more = f" {len(lines) - len(shown)} more are at work." if len(lines) > len(shown) else ""
    title = "Curves so far" + (f": {data}" if data else "")
    return Plot(
        "now", title, f"{name} of the runs at work, epoch by epoch.{more}", b"", "".join([*parts, "</svg>"])
    )


def _line(path: str, colour: str, width: float, opacity: float = 1.0) -> str:
    drawn = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"'
    return f'<path d="{path}" {drawn}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers within; none where they cannot be told apart."""
    quarter = (high - low) / 4
    if not 0 < quarter < math.inf or low + quarter / 4 == low:
        return []
    digits = math.floor(math.log10(quarter))
    step = 10.0**digits
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    return [
        round(n * step, max(10, 2 - digits))
        for n in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]
