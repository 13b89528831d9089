"""Long lists, a page at a time."""

from collections.abc import Sequence
from typing import Any

from offload.daemon.http.errors import NotFound
from offload.daemon.http.schema_responses import Item


def page_of(items: Sequence[Item], after: str | None, limit: int, order: str) -> dict[str, Any]:
    """Return a page of items, as OpenAI's lists are.

    Parameters
    ----------
    items : sequence of dict
        Oldest first.
    after : str or None
        The id of the last item of the page before.
    limit : int
        0: as many as there are.
    order : {"asc", "desc"}

    Raises
    ------
    NotFound
        No item has the id ``after``.
    """
    found = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        ids = [item["id"] for item in found]
        if after not in ids:
            raise NotFound(f"there is no item {after[:80]!r} to begin after")
        found = found[ids.index(after) + 1 :]
    page = found[: limit or None]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(found) > len(page),
    }
