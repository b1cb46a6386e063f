"""Machine code as nvdisasm prints it, taken apart: instructions, where they come from, loops."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path

# address, predicate, mnemonic, operands
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?\w+\s+)?)([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_JUMP = re.compile(r"`\((\.L_\w+)\)")
_SOURCE = re.compile(r'\s*//## File "(.+)", line (\d+)')
_JUMPS = ("BRA", "CALL", "JMP")
_ENDS = ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Instruction:
    """One line of the code; file and line are the Python's, None where the compiler says none."""

    mnemonic: str
    operands: str
    predicate: str
    # of the text
    row: int
    file: str | None
    line: int | None

    @property
    def word(self):
        return self.mnemonic.split(".")[0]

    @property
    def target(self):
        """The label that it names, if any."""
        found = _JUMP.search(self.operands)
        return found[1] if found else None


@dataclass
class Listing:
    """The instructions of a text, and the labels: {name: number of the instruction behind it}."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def spans(self):
        """[(first, last)] of what stands between a label and a jump back to it, with calls."""
        return [
            (self.labels[i.target], n)
            for n, i in enumerate(self.instructions)
            if self.labels.get(i.target, n + 1) <= n
        ]

    def inner_loops(self, works=lambda instruction: True):
        """[the numbers of a loop's instructions] of loops with no other loop inside.

        A loop is a cycle of the control flow: a block that stands behind it and jumps back into it
        is a part of it. works: a loop without any instruction of which this is true is none, as one
        that waits for a barrier.
        """
        blocks, edges = self._blocks()
        busy = {
            b for b, (first, end) in enumerate(blocks)
            if any(works(i) for i in self.instructions[first:end])
        }  # fmt: skip
        found = _innermost(set(range(len(blocks))), edges, busy)
        return [
            [n for b in sorted(loop) for n in range(*blocks[b])] for loop in sorted(found, key=min)
        ]

    def always(self, loop):
        """Those of a loop's instructions that every pass runs, whatever it jumps over."""
        blocks, edges = self._blocks()
        inside = {b for b, (first, _) in enumerate(blocks) if first in loop}
        head = _head(inside, edges)
        edges = {b: edges[b] & inside for b in inside}
        return [
            n for b in sorted(inside)
            if b == head or head not in _reached(edges, head, without=b)
            for n in range(*blocks[b])
        ]  # fmt: skip

    def _blocks(self):
        """([(first, end)] of the straight pieces of code, {piece: the pieces that may follow})."""
        code = self.instructions
        starts = {0, *self.labels.values()} | {
            n + 1 for n, i in enumerate(code) if i.word in (*_JUMPS, *_ENDS)
        }
        starts = sorted(n for n in starts if n < len(code))
        blocks = list(zip(starts, [*starts[1:], len(code)]))
        number = {first: b for b, (first, _) in enumerate(blocks)}
        edges = {b: set() for b in range(len(blocks))}
        for b, (_, end) in enumerate(blocks):
            last = code[end - 1]
            if last.word in _JUMPS and self.labels.get(last.target) in number:
                edges[b].add(number[self.labels[last.target]])
            # BRA.U UP0 and BRA P0, `(…) are taken or not, without a predicate in front
            always = not last.predicate and last.operands.lstrip().startswith("`")
            ends = (last.word in _ENDS and not last.predicate) or (last.word == "BRA" and always)
            if not ends and end in number:
                edges[b].add(number[end])
        return blocks, edges


def parse(text):
    """The Listing of a text that `nvdisasm -c` printed, with `-g` or without."""
    listing, file, line = Listing(), None, None
    for row, said in enumerate(text.splitlines()):
        if found := _LABEL.match(said):
            listing.labels[found[1]] = len(listing.instructions)
        elif found := _SOURCE.match(said):
            file, line = found[1], int(found[2])
        elif found := _INSTRUCTION.search(said):
            _, predicate, mnemonic, operands = found.groups()
            listing.instructions.append(
                Instruction(mnemonic, operands, predicate.strip(), row, file, line)
            )
    return listing


@cache
def located(file):
    """The source file that an instruction's line is of.

    Triton's cache may hold code that was compiled from a copy elsewhere; the copy that this process
    has loaded is meant.
    """
    path = Path(file)
    loaded = [Path(m.__file__) for m in tuple(sys.modules.values()) if getattr(m, "__file__", None)]
    copies = [p for p in loaded if p.name == path.name]
    if copies and path not in copies:
        path = max(copies, key=lambda copy: _common_tail(copy, path))
    return path


@cache
def shown(file):
    """A source file as Python found it: from the nearest folder of the path above it."""
    path = located(file)
    roots = [root for root in (Path.cwd(), *map(Path, sys.path)) if path.is_relative_to(root)]
    nearest = max(roots, key=lambda root: len(root.parts), default=None)
    return (path.relative_to(nearest) if nearest else path).as_posix()


def _common_tail(one, other):
    pairs = zip(reversed(one.parts), reversed(other.parts))
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _innermost(nodes, edges, busy):
    """Cycles that hold no smaller one, of those with a busy node."""
    found = []
    for cycle in _cycles(nodes, edges):
        if not cycle & busy:
            continue
        head = _head(cycle, edges)
        inside = {n: edges[n] & cycle - {head} for n in cycle}
        found += _innermost(cycle, inside, busy) or [cycle]
    return found


def _head(cycle, edges):
    """Where a loop is entered: where its code begins, unless it is jumped into."""
    outside = {after for n in edges if n not in cycle for after in edges[n]}
    return min(cycle & outside or cycle)


def _reached(edges, start, without):
    """The nodes that one or more steps lead to from a node, but for one."""
    seen, todo = set(), [start]
    while todo:
        fresh = edges[todo.pop()] - seen - {without}
        seen |= fresh
        todo += fresh
    return seen


def _cycles(nodes, edges):
    """The strongly connected parts that have an edge inside (Kosaraju's two walks)."""
    order, seen = [], set()
    for start in sorted(nodes):
        _walk(start, edges, nodes, seen, order)
    back = {n: set() for n in nodes}
    for n in nodes:
        for after in edges[n] & nodes:
            back[after].add(n)
    seen, found = set(), []
    for start in reversed(order):
        part = []
        _walk(start, back, nodes, seen, part)
        if len(part) > 1 or (part and part[0] in edges[part[0]]):
            found.append(set(part))
    return found


def _walk(start, edges, nodes, seen, order):
    """Depth first from a node, appended when all behind it was seen."""
    if start in seen:
        return
    seen.add(start)
    stack = [(start, iter(sorted(edges[start] & nodes)))]
    while stack:
        node, after = stack[-1]
        following = next((n for n in after if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(sorted(edges[following] & nodes))))
