"""Which replica a request goes to: the one that it must, the one that had it before, or the least busy one."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Asked", "Routes"]

MOST_REMEMBERED = 10_000
SLACK = 1  # requests that a replica may have more than the least busy one, if it draws with the same weights


@dataclass(frozen=True)
class Asked:
    """Everything that a request's way depends on.

    Attributes:
        replica: begins the name of what is asked for, a job or a picture that one replica alone has.
        key: equal for requests that may be repeats of one another.
        client: whose requests all go to one replica, as it remembers what was said before.
        weights: what it is drawn with, the model and its LoRAs; None where all replicas have the same.
    """

    replica: str | None = None
    key: str | None = None
    client: str | None = None
    weights: str | None = None


class Routes:
    """What is known of where requests went."""

    def __init__(self) -> None:
        self._by_key = OrderedDict[str, str]()
        self._homes = OrderedDict[str, set[str]]()
        self._turns, self._turn = dict[str, int](), 0  # when each replica had its last request

    def choose(self, asked: Asked, busy: Mapping[str, int]) -> list[str]:
        """Return the replicas that may take a request, the one first that is to have it.

        Args:
            asked: of the request.
            busy: how much each replica that is there has to do, as far as that is known.
        """
        if asked.replica is not None and asked.replica in busy:
            return [asked.replica]
        if asked.key is not None and self._by_key.get(asked.key) in busy:
            return [self._by_key[asked.key]]
        if asked.client is not None and busy:
            # By rendezvous, so that all doors choose alike and few clients move when replicas come or go.
            return [max(busy, key=lambda replica: hashlib.sha256(f"{asked.client}\0{replica}".encode()).digest())]
        homes = self._homes.get(asked.weights or "", set()) & busy.keys()
        near = bool(homes) and min(busy[one] for one in homes) <= min(busy.values()) + SLACK

        def rank(replica: str) -> tuple[bool, int, int]:
            return near and replica not in homes, busy[replica], self._turns.get(replica, 0)

        return sorted(busy, key=rank)

    def went(self, asked: Asked, replica: str) -> None:
        """Note which replica took a request."""
        self._turn += 1
        self._turns[replica] = self._turn
        if asked.key is not None:
            self._by_key[asked.key] = replica
            self._by_key.move_to_end(asked.key)
            if len(self._by_key) > MOST_REMEMBERED:
                self._by_key.popitem(last=False)
        if asked.weights is not None:
            self._homes.setdefault(asked.weights, set()).add(replica)
            self._homes.move_to_end(asked.weights)
            if len(self._homes) > MOST_REMEMBERED:
                self._homes.popitem(last=False)
