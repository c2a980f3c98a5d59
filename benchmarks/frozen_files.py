"""Bytes that weights take in files of frozen models, and time to pack them: ``python benchmarks/frozen_files.py``."""

import time

import torch

from qsparseprop.inference.packing import pack_weight, unpack_weight
from qsparseprop.inference.steps import Weight

ROWS, COLUMNS, ZEROS = 512, (64, 576, 4608), (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


def random_weight(rows: int, columns: int, zeros: float) -> Weight:
    g = torch.Generator().manual_seed(columns)
    mask = torch.rand(rows, columns, generator=g) >= zeros
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    codes = torch.randint(1, 128, (int(mask.sum()),), generator=g).to(torch.int8)
    return Weight(crow, mask.nonzero()[:, 1].to(torch.int32), codes, torch.ones(rows), columns)


def main() -> None:
    print("zeros   columns  way         bytes/nonzero  pack ns/nonzero  unpack ns/nonzero")
    for zeros in ZEROS:
        for columns in COLUMNS:
            weight = random_weight(ROWS, columns, zeros)
            start = time.perf_counter()
            packed = pack_weight(weight)
            middle = time.perf_counter()
            unpack_weight(packed, weight.scale)
            end = time.perf_counter()
            size, n = sum(part.nbytes for part in packed.parts.values()), packed.nonzeros
            print(f"{zeros:6.1%} {columns:8} {packed.way:>11} {size / n:14.3f} {(middle - start) * 1e9 / n:16.1f} "
                  f"{(end - middle) * 1e9 / n:18.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
