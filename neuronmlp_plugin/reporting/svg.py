"""A figure as SVG that can stand inside a page: same bytes every time, colours from the style sheet, words
for a screen reader.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

from markupsafe import Markup

from neuronmlp_plugin.reporting.figures import CSS_COLOURS, STYLE, Plot

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def to_svg(plot: Plot) -> Markup:
    """The `<svg>` element of a plot; text stays text, in the page's font."""
    root = ET.fromstring(_drawn(plot))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (
                f"{{{_SVG}}}metadata",
                f"{{{_SVG}}}style",
            ):  # a style inside would rule the whole page
                parent.remove(child)
    _drop_unused_ids(root)
    for size in ("width", "height"):  # the style sheet decides; the view box keeps the shape
        root.attrib.pop(size)
    root.set("role", "img")
    root.set("aria-label", f"{plot.title}. {plot.alt}")
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return Markup(_themed(ET.tostring(root, encoding="unicode")))  # ElementTree has escaped all text


def _drawn(plot: Plot) -> str:
    import matplotlib

    # Names of clip paths and markers come from the salt: one a plot, since they share a page.
    settings = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": plot.name}
    target = io.StringIO()
    with matplotlib.rc_context(settings):
        plot.figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return target.getvalue()


def _drop_unused_ids(root: ET.Element) -> None:
    """matplotlib numbers every group alike in every figure; only what is referred to may keep its name."""
    used = set(re.findall(r"#(\w+)", ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _themed(text: str) -> str:
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for stand_in, variable in CSS_COLOURS.items():
        text = text.replace(stand_in, f"var({variable})")
    return re.sub(r"\s*\n\s*", " ", text)
