"""The exact index: every chunk that attention may see. The reference for all others."""


def visible_chunks(
    num_chunks: int, chunk_tokens: int, first_query: int, window: int | None
) -> range:
    """Return the positions of the past chunks that some query can see.

    Parameters
    ----------
    num_chunks : int
        Full chunks before the queries.
    chunk_tokens : int
    first_query : int
        Position of the earliest query; the one that sees furthest back.
    window : int or None
        Sliding window in tokens: a query sees keys later than ``position - window``.
    """
    first_key = 0 if window is None else max(0, first_query - window + 1)
    return range(min(first_key // chunk_tokens, num_chunks), num_chunks)
