"""A script: random batches through a library of int8.c that was compiled with a sanitizer."""

from __future__ import annotations

import ctypes
import random
import sys
from pathlib import Path

from collegium.experts.engine import int8, kernels
from collegium.experts.engine.batch import PAGE
from collegium.experts.engine.lora import read_lora
from collegium.tests.engine_models import VOCAB, Row, feed

PAGES, MOST, LONGEST = 64, 96, 9 * PAGE


class Exact:
    """Memory that is allocated piece by piece, so that the sanitizer knows where each ends."""

    def __init__(self, size: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.calloc.restype = ctypes.c_void_p
        self._pieces: list[int] = []

    def take(self, size: int) -> int:
        self._pieces.append(self._libc.calloc(1, ctypes.c_size_t(size)))
        return self._pieces[-1]

    def __del__(self) -> None:
        for piece in self._pieces:
            self._libc.free(ctypes.c_void_p(piece))


def main(library: str, base: str, *adapters: str) -> None:
    vars(kernels)["library"] = lambda: ctypes.CDLL(library)
    vars(int8)["Memory"] = Exact
    decoder = int8.Int8Decoder(Path(base), pages=PAGES, slots=len(adapters), most_tokens=MOST, threads=3)
    loras = [read_lora(Path(folder), folder) for folder in adapters]
    draw = random.Random(1)
    for repeat in range(6):
        for slot in range(1, len(loras) + 1):
            if not repeat or draw.random() < 0.2:
                decoder.load(slot, draw.choice(loras))
        pages = draw.sample(range(PAGES), PAGES)
        rows = [
            Row(draw.choices(range(VOCAB), k=draw.choice([1, 3, 16, 17, 40, LONGEST])), pages[at : at + 9], slot)
            for at, slot in zip(
                range(0, 9 * 7, 9), draw.choices(range(len(loras) + 1), k=draw.randint(1, 7)), strict=False
            )
        ]
        while waiting := [row for row in rows if row.done < len(row.tokens)]:
            counts: list[int] = []
            for row in waiting:
                room = MOST - sum(counts) - (len(waiting) - len(counts) - 1)
                counts.append(min(draw.choice([1, 1, 2, 5, 16, 17, 33]), len(row.tokens) - row.done, room))
            feed(decoder, waiting, counts)
    decoder.close()
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
