"""How many services are handed to a registry at once: as many as it writes in about a second."""

# The least fills a registry's connections, or its transactions. The most, made and handed over at a time, keeps a
# first sync of 80,000 out of memory. Every batch costs a wait for its last write, so the first is not the least.
LEAST, FIRST, MOST = 128, 256, 4096
# Seconds a batch is to take, and by how much the next may be larger: one quick batch proves little.
TAKES, GROWTH = 1.0, 8


def next_batch(size: int, seconds: float) -> int:
    """Return the size of the next batch after one of this size took so many seconds."""
    fitting = int(size * min(TAKES / max(seconds, 0.001), GROWTH))
    return min(max(fitting, LEAST), MOST)
