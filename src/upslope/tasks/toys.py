"""Two tasks of single letters whose best reply is known: shortest walks in a graph, and a key whose door pays late.

Shortest paths as text: walk from a node to the goal of a random directed graph in as few steps as possible.

The toy problem of trlx (its randomwalks example; Chen et al. 2021, arXiv 2106.01345, section 3, has the idea): a model
imitates random walks, and reinforcement learning must find the shortest ones, which it has hardly seen. Nodes are
single letters; the goal is "a". The prompt is the start node, the completion the nodes that follow, without blanks.

    optimality = (max_length - length) / (max_length - shortest)    in [0, 1], 1 for a shortest path

Length and shortest count nodes, the start and the goal included. A walk that takes an edge that is not there, or does
not reach the goal within max_length nodes, has optimality 0. What follows the goal is not read.

Credit behind noise: a choice in the middle of the way pays only at its end, and what came before it is a lottery.

After Hung et al. (2019, arXiv 1810.06721), who measure how well an agent assigns credit to a key that opens a door
much later, with distracting apples on the way. Here a letter is a step:

    a or b, c or d, ... w or x    y or z      A or B, C or D, E or F
    `-------- apples --------'    key         corridor

Every step has two letters of its own, so that the last letter tells where one stands. At each of the first steps either
letter is an apple worth +noise or -noise; then the second letter ("z" above) takes the key; at the end of the corridor
the door pays `door` if it was taken.

An apple's worth is a coin toss that depends on the room (the prompt), the step and the letter: known to the judge,
the same whenever the same letter is picked there, zero on average, and in no relation to the key. Over many rooms there
is nothing in it to learn, but it drowns the door in the total: apples bring `steps` times noise squared of variance.
A learner that knows when rewards came is not fooled: what was earned before the key is not in its return to go, and a
critic carries the door's pay back through the silent corridor.

Rewards carry their steps (`Reward.steps`), one token per letter; a learner that looks at the total sees the sum.
"""

import hashlib
import random
from collections.abc import Sequence

from upslope.errors import ConfigError, DataError
from upslope.tasks.base import (
    Split,
    Task,
    answered,
    check_split,
    checked_fraction,
    content_key,
    derive_seed,
    prompt_text,
    shuffled,
)
from upslope.types import Message, Prompt, Reward

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOAL = 0


class RandomWalks(Task):
    """Walks on one random graph.

    nodes: how many, the goal included; edge_probability: of each possible edge; max_length: most nodes of a walk;
    seed: of the graph. A graph in which some node has no way to leave it is drawn again, as in trlx.

    Both splits hold the same prompts, the start nodes from which the goal can be reached in time: there is nothing
    else to ask of one graph, and what is measured is control, not generalisation.
    """

    name = "random_walks"
    inline_safe = True

    def __init__(
        self, *, nodes: int = 21, edge_probability: float = 0.1, max_length: int = 10, seed: int = 1002
    ) -> None:
        if not 2 <= nodes <= len(LETTERS):
            raise ConfigError(f"'random_walks': nodes must lie between 2 and {len(LETTERS)}, got {nodes}")
        if not 0 < edge_probability < 1:
            raise ConfigError(f"'random_walks': edge_probability must lie between 0 and 1, got {edge_probability}")
        if max_length < 3:
            raise ConfigError(f"'random_walks': max_length must be at least 3, got {max_length}")
        self.nodes, self.max_length = nodes, max_length
        self.edges = _draw_graph(nodes, edge_probability, seed)
        self.shortest = _shortest_lengths(self.edges)
        self.starts = [
            node for node in range(nodes) if node != GOAL and self.shortest.get(node, max_length) < max_length
        ]
        if not self.starts:
            raise ConfigError("'random_walks': the goal cannot be reached from any node; raise edge_probability")

    def size(self, split: Split) -> int:
        """How many start nodes there are, the same in both splits."""
        return len(self.starts)

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different start nodes, in an order given by `seed`. DataError: there are fewer."""
        check_split(split, n)
        if n > len(self.starts):
            raise DataError(
                f"task 'random_walks': only {len(self.starts)} start nodes reach the goal where {n} prompts were "
                f"asked for; ask for at most {len(self.starts)}"
            )
        return [
            Prompt(content_key(LETTERS[node]), text=LETTERS[node], answer=self.shortest_walk(node)[1:])
            for node in shuffled(self.starts, "random_walks", split, seed)[:n]
        ]

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """One random walk from the prompt's node: legal, hardly ever shortest."""
        start = prompt_text(prompt)
        return answered(prompt, self.walk(LETTERS.index(start), random.Random(derive_seed("walk", start)))[1:])

    def walks(self, n: int, *, seed: int) -> list[str]:
        """`n` random walks from random start nodes: what the model is to imitate before it is rewarded."""
        draw = random.Random(derive_seed("walks", seed))
        return [self.walk(draw.choice(self.starts), draw) for _ in range(n)]

    def walk(self, start: int, draw: random.Random) -> str:
        """A random walk until the goal or max_length nodes, as letters."""
        nodes = [start]
        while nodes[-1] != GOAL and len(nodes) < self.max_length:
            nodes.append(draw.choice(self.edges[nodes[-1]]))
        return "".join(LETTERS[node] for node in nodes)

    def shortest_walk(self, start: int) -> str:
        """One of the shortest walks from `start`, as letters."""
        nodes = [start]
        while nodes[-1] != GOAL:
            nodes.append(min(self.edges[nodes[-1]], key=lambda node: self.shortest.get(node, self.nodes + 1)))
        return "".join(LETTERS[node] for node in nodes)

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """Optimality of the walk; correct means a shortest path."""
        start = prompt_text(prompt)
        length = self.length_of(start + "".join(text.split()))
        if length is None:
            return Reward(value=0.0, parts={"reached": 0.0}, correct=False)
        shortest = self.shortest[LETTERS.index(start)]
        optimality = (self.max_length - length) / (self.max_length - shortest)
        return Reward(value=optimality, parts={"reached": 1.0}, correct=length == shortest)

    def length_of(self, walk: str) -> int | None:
        """Nodes up to the goal, or None where the walk breaks a rule or does not get there in time."""
        nodes = [LETTERS.find(letter) for letter in walk[: self.max_length]]
        for place, node in enumerate(nodes):
            if not 0 <= node < self.nodes or (place and node not in self.edges[nodes[place - 1]]):
                return None
            if node == GOAL:
                return place + 1
        return None


def _draw_graph(nodes: int, edge_probability: float, seed: int) -> list[list[int]]:
    """Successors of every node, none its own; the goal has only itself."""
    draw = random.Random(derive_seed("graph", nodes, edge_probability, seed))
    for _ in range(100_000):
        edges = [[j for j in range(nodes) if j != i and draw.random() < edge_probability] for i in range(nodes)]
        if all(edges[1:]):
            return [[GOAL], *edges[1:]]
    raise ConfigError("'random_walks': no graph without dead ends was found; raise edge_probability")


def _shortest_lengths(edges: list[list[int]]) -> dict[int, int]:
    """Nodes of a shortest path to the goal, both ends counted, by breadth-first search backwards."""
    found, queue = {GOAL: 1}, [GOAL]
    for node in queue:
        for earlier, successors in enumerate(edges):
            if node in successors and earlier not in found:
                found[earlier] = found[node] + 1
                queue.append(earlier)
    return found


ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"


class KeyDoor(Task):
    """Rooms with apples, a key, a corridor and a door.

    steps: apples before the key; corridor: letters between key and door; door: what the door pays; noise: size of an
    apple's worth; room: digits of the prompt. A completion that stops, or takes a letter of another step, within its
    steps + 1 + corridor letters does not reach the door; what follows them is not read. `correct` says that the door
    was opened.
    """

    name = "key_door"
    inline_safe = True
    open_ended = True

    def __init__(
        self,
        *,
        steps: int = 12,
        corridor: int = 3,
        door: float = 1.0,
        noise: float = 3.0,
        room: int = 6,
        eval_fraction: float = 0.2,
    ) -> None:
        most = len(ALPHABET) // 2
        if min(steps, room) < 1 or corridor < 0 or steps + 1 + corridor > most:
            raise ConfigError(
                f"'key_door': steps and room must be at least 1, corridor at least 0 and steps + 1 + corridor at most "
                f"{most}, got {steps}, {room} and {corridor}"
            )
        if not (door > 0 and noise >= 0):
            raise ConfigError(f"'key_door': door must be positive and noise not negative, got {door} and {noise}")
        self.steps, self.corridor, self.door, self.noise = steps, corridor, door, noise
        self.room, self.eval_fraction = room, checked_fraction(eval_fraction)
        self.length = steps + 1 + corridor  # letters of a whole way

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different rooms, each a few digits. DataError: there are fewer."""
        draw = random.Random(derive_seed("key_door", split, seed))
        rooms = (Prompt(key=0, text="".join(draw.choices(DIGITS, k=self.room))) for _ in iter(int, 1))
        return self.select(rooms, split, n)

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """A way with letters drawn at random, the key taken half the time: the form, not the solution."""
        draw = random.Random(derive_seed("key_door walk", prompt_text(prompt)))
        return answered(prompt, self.way([draw.random() < 0.5 for _ in range(self.length)]))

    def way(self, choices: Sequence[bool]) -> str:
        """The letters of a choice at each step: False is a step's first letter, True its second."""
        return "".join(ALPHABET[2 * step + choice] for step, choice in enumerate(choices))

    def worth(self, room: str, step: int, letter: str) -> float:
        """What a letter earns as the apple of a step."""
        digest = hashlib.blake2b(f"{room}\x1f{step}\x1f{letter}".encode(), digest_size=1).digest()
        return self.noise if digest[0] & 1 else -self.noise

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """The apples of the way and the door's pay, at the letters that earned them."""
        way = "".join(text.split())[: self.length]
        sound = next((i for i, x in enumerate(way) if x not in ALPHABET[2 * i : 2 * i + 2]), len(way))
        apples = [(i, self.worth(prompt_text(prompt), i, way[i])) for i in range(min(sound, self.steps))]
        opened = sound == self.length and way[self.steps] == ALPHABET[2 * self.steps + 1]
        pay = self.door if opened else 0.0
        collected = sum(value for _, value in apples)
        return Reward(
            value=collected + pay,
            parts={"apples": collected, "door": pay},
            correct=opened,
            steps=[*apples, *([(self.length - 1, pay)] if opened else [])],
        )
