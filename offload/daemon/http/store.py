"""What the APIs remember between requests: responses, conversations, and how answers were worded.

Every row belongs to a tenant, and no question is ever asked without one.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.daemon.http.columns import Columns
from offload.daemon.http.errors import NotFound
from offload.daemon.http.tables import HttpTables
from offload.tiers.sealing import Sealer


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response with what it answered.

    Attributes
    ----------
    previous : str or None
        The response that it continues.
    session : str or None
    body : dict
        As it was sent.
    input : list of dict
        Items of the request, without those of earlier ones.
    """

    previous: str | None
    session: str | None
    body: dict[str, Any]
    input: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """How an answer was worded.

    Attributes
    ----------
    session : str or None
    opening : str
        What the chat template wrote of it.
    token_ids : bytes
        That were generated, four bytes each.
    """

    session: str | None
    opening: str
    token_ids: bytes


class HttpStore:
    """Rows by tenant and id. Any thread.

    Parameters
    ----------
    folder : Path
    ttl_s : float
    max_rows, max_bytes : int
        As for ``HttpTables``.
    sealer : Sealer, optional
        Encrypts what was said; ids, names of sessions and times stay as they are.
    """

    def __init__(
        self,
        folder: Path,
        ttl_s: float,
        max_rows: int,
        max_bytes: int,
        sealer: Sealer | None = None,
    ) -> None:
        self._tables = HttpTables(folder, ttl_s, max_rows, max_bytes)
        self._columns = Columns(sealer)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._tables.close()

    def put_response(self, tenant: str, response: StoredResponse) -> None:
        """Store a response, or store it anew."""
        self._tables.write(
            "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
            tenant,
            response.body["id"],
            response.previous,
            response.session,
            *(
                self._columns.hide_text(
                    json.dumps(part), "responses", tenant, response.body["id"], column
                )
                for column, part in (("body", response.body), ("input", response.input))
            ),
            time.time(),
        )

    def response(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response, or raise NotFound."""
        row = self._tables.run(
            "UPDATE responses SET used_s = ? WHERE tenant = ? AND id = ? "
            "RETURNING previous, session, body, input",
            time.time(),
            tenant,
            response_id,
        )
        if not row:
            raise NotFound(f"there is no response {response_id[:80]!r}")
        previous, session, body, items = row[0]
        show, row_of = self._columns.show_text, ("responses", tenant, response_id)
        return StoredResponse(
            previous,
            session,
            json.loads(show(body, *row_of, "body")),
            json.loads(show(items, *row_of, "input")),
        )

    def history(self, tenant: str, response_id: str) -> list[dict[str, Any]]:
        """Return the items that a response ends, oldest first: inputs and outputs in turn."""
        found: list[list[dict[str, Any]]] = []
        name: str | None = response_id
        while name is not None:
            response = self.response(tenant, name)
            found.append([*response.input, *response.body["output"]])
            name = response.previous
        return [item for items in reversed(found) for item in items]

    def delete_response(self, tenant: str, response_id: str) -> None:
        """Delete a response, or raise NotFound."""
        rows = self._tables.run(
            "DELETE FROM responses WHERE tenant = ? AND id = ? RETURNING id", tenant, response_id
        )
        if not rows:
            raise NotFound(f"there is no response {response_id[:80]!r}")

    def put_conversation(self, tenant: str, body: dict[str, Any]) -> None:
        """Store a conversation, or its new metadata."""
        self._tables.write(
            "INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?)",
            tenant,
            body["id"],
            self._columns.hide_text(json.dumps(body), "conversations", tenant, body["id"]),
            time.time(),
        )

    def conversation(self, tenant: str, conversation_id: str) -> dict[str, Any]:
        """Return a conversation, or raise NotFound."""
        rows = self._tables.run(
            "UPDATE conversations SET used_s = ? WHERE tenant = ? AND id = ? RETURNING body",
            time.time(),
            tenant,
            conversation_id,
        )
        if not rows:
            raise NotFound(f"there is no conversation {conversation_id[:80]!r}")
        body: dict[str, Any]
        body = json.loads(
            self._columns.show_text(rows[0][0], "conversations", tenant, conversation_id)
        )
        return body

    def delete_conversation(self, tenant: str, conversation_id: str) -> None:
        """Delete a conversation with its items, or raise NotFound."""
        self.conversation(tenant, conversation_id)
        self._tables.write(
            "DELETE FROM items WHERE tenant = ? AND conversation = ?", tenant, conversation_id
        )
        self._tables.write(
            "DELETE FROM conversations WHERE tenant = ? AND id = ?", tenant, conversation_id
        )

    def add_items(self, tenant: str, conversation_id: str, items: Sequence[dict[str, Any]]) -> None:
        """Add items at the end of a conversation; one whose id is there already is replaced."""
        for item in items:
            self._tables.write(
                "INSERT INTO items (tenant, conversation, id, body) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (tenant, conversation, id) DO UPDATE SET body = excluded.body",
                tenant,
                conversation_id,
                item["id"],
                self._columns.hide_text(
                    json.dumps(item), "items", tenant, conversation_id, item["id"]
                ),
            )

    def items(self, tenant: str, conversation_id: str) -> list[dict[str, Any]]:
        """Return the items of a conversation, oldest first."""
        self.conversation(tenant, conversation_id)
        rows = self._tables.run(
            "SELECT id, body FROM items WHERE tenant = ? AND conversation = ? ORDER BY position",
            tenant,
            conversation_id,
        )
        return [
            json.loads(self._columns.show_text(body, "items", tenant, conversation_id, name))
            for name, body in rows
        ]

    def delete_item(self, tenant: str, conversation_id: str, item_id: str) -> None:
        """Delete an item, or raise NotFound."""
        rows = self._tables.run(
            "DELETE FROM items WHERE tenant = ? AND conversation = ? AND id = ? RETURNING id",
            tenant,
            conversation_id,
            item_id,
        )
        if not rows:
            raise NotFound(f"the conversation has no item {item_id[:80]!r}")

    def put_answer(self, tenant: str, key: str, answer: StoredAnswer) -> None:
        """Store an answer under the digest of the conversation that it ends."""
        self._tables.write(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            tenant,
            self._columns.name(key),
            answer.session,
            self._columns.hide_text(answer.opening, "answers", tenant, key, "opening"),
            self._columns.hide(answer.token_ids, "answers", tenant, key, "token_ids"),
            time.time(),
        )

    def forget_answers(self, tenant: str, session: str) -> None:
        """Delete the answers of a session."""
        self._tables.write("DELETE FROM answers WHERE tenant = ? AND session = ?", tenant, session)

    def answer(self, tenant: str, key: str) -> tuple[str, bytes] | None:
        """Return the opening and the tokens of an answer, if it is known."""
        rows = self._tables.run(
            "UPDATE answers SET used_s = ? WHERE tenant = ? AND id = ? "
            "RETURNING opening, token_ids",
            time.time(),
            tenant,
            self._columns.name(key),
        )
        if not rows:
            return None
        show, row_of = self._columns, ("answers", tenant, key)
        opening, token_ids = rows[0]
        return (
            show.show_text(opening, *row_of, "opening"),
            show.show(token_ids, *row_of, "token_ids"),
        )
