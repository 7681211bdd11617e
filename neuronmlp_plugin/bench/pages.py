"""Pages whose tables are made: blocks between markers, which nobody writes by hand.

<!-- bench docs: NAME -->
```text
...
```
<!-- end -->
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from neuronmlp_plugin.errors import UsageError

MARKED = re.compile(r"<!-- bench docs: (?P<name>[\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def block_names(page: pathlib.Path) -> list[str]:
    """The names of a page's blocks, in order. Raises UsageError where the page is not there."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{page}: expected a page with blocks to fill, found {error.strerror}.") from error
    return [found["name"] for found in MARKED.finditer(text)]


def fill_blocks(page: pathlib.Path, blocks: Mapping[str, list[str]]) -> None:
    """Write `blocks`, lines by name, in the places of the same names. Raises UsageError where names
    differ.
    """
    found = block_names(page)
    if sorted(found) != sorted(blocks):
        raise UsageError(
            f"{page}: expected the blocks {', '.join(sorted(blocks))}, found {', '.join(sorted(found))}; "
            "add or remove markers."
        )

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        lines = "\n".join(line.rstrip() for line in blocks[name])
        return f"<!-- bench docs: {name} -->\n```text\n{lines}\n```\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    page.write_text(MARKED.sub(filled, text), encoding="utf-8")
