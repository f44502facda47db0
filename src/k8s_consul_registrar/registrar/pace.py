"""How many services are handed to a registry at once: as many as it writes in about a second."""

# The first batch is the least, which already fills a registry's connections, or its transactions. The most,
# made and handed over at a time, keeps a first sync of 80,000 out of memory.
LEAST, MOST = 128, 4096
# Seconds that a batch may take without the next being larger, or smaller.
SHORT, LONG = 0.5, 2.0


def next_batch(size: int, seconds: float) -> int:
    """Return the size of the next batch after one of this size took so many seconds."""
    if seconds < SHORT:
        return min(2 * size, MOST)
    return max(size // 2, LEAST) if seconds > LONG else size
