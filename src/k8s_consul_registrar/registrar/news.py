"""Says what stands for long once: when it begins, and when it changes."""

from collections.abc import Iterable, Mapping


class News:
    """Remembers the standing facts of each topic, so that one is said when it begins and not again."""

    def __init__(self) -> None:
        self._said: dict[str, Mapping[str, str]] = {}

    def fresh(self, topic: str, facts: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the facts that are new or changed since the last call for this topic."""
        said = self._said.get(topic, {})
        self._said[topic] = dict(facts)
        return [(about, text) for about, text in facts.items() if said.get(about) != text]

    def further(self, topic: str, facts: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the facts that are new or changed, where those said before still stand."""
        if not facts:
            return []
        said = self._said.get(topic, {})
        self._said[topic] = {**said, **facts}
        return [(about, text) for about, text in facts.items() if said.get(about) != text]

    def over(self, topic: str, abouts: Iterable[str]) -> None:
        """Note that what was said about these no longer stands."""
        said = self._said.get(topic)
        if said:
            gone = set(abouts)
            self._said[topic] = {about: text for about, text in said.items() if about not in gone}
