"""How every figure looks: colours that the colour-blind tell apart, no background, axes that work on light and dark."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008), without black and yellow: one vanishes on a dark page, the other on a light one.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
LINES = ("-", "--", "-.", ":")
INK = "#808080"  # readable on white and on black; the page replaces it by its own text colour
PALE = "#9a9a9a"

METHOD_COLOURS = {
    "random": PALE,
    "uniform": SKY,
    "default": PURPLE,
    "first_dense": VERMILLION,
    "block_influence": GREEN,
    "static": ORANGE,
    "dynamic (before fine-tuning)": PURPLE,
    "dynamic": BLUE,
}

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a run named "$x" is a name, not a formula
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}


@contextmanager
def house_style(salt: str = "ftp") -> Iterator[None]:
    """Draw and save inside it. `salt` fixes the ids inside the SVG: the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context({**RC, "svg.hashsalt": salt}):
        yield


def canvas(width: float = 5.4, height: float = 3.1, **grid: Any) -> tuple["Figure", Any]:
    """A figure of `width` x `height` inches and its axes; no pyplot, so nothing global is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def plain_log(axis: Any, decades: float) -> None:
    """Ticks of a logarithmic axis as plain numbers; also between the powers of ten where it spans few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def freeze(figure: "Figure") -> None:
    """Lays the figure out once; saving it in several formats does not have to do it again."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def method_colour(name: str, position: int = 0) -> str:
    """The colour of a method, the same in every figure; unknown methods take turns."""
    return METHOD_COLOURS.get(name, (VERMILLION, GREEN)[position % 2])


def to_svg(figure: "Figure") -> str:
    """The figure as an `<svg>` element for an HTML page: no prolog, no addresses, no ids but those it refers to."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return svg.replace(INK, "currentColor")


def to_png(figure: "Figure") -> bytes:
    """The figure as a PNG with a transparent background, 160 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()
