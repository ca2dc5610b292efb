"""Numbers that others have published, for tables beside ours: always marked as quoted, never as measured here.

FTP: Li et al. 2024, arXiv 2412.11494; BlockPruner and ShortGPT as that paper gives them. Retention in %, over ARC-c,
ARC-e, HellaSwag, MMLU and WinoGrande. Nominal sparsity is that of each method's own kind (tokens, blocks).
"""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def _rows(*rows: tuple[str, str, float, float]) -> list[Record]:
    names = ("model", "method", "sparsity", "retention")
    return [dict(zip(names, row, strict=True)) | {"source": "quoted"} for row in rows]


MAIN = _rows(
    ("LLaMA2-7B", "FTP", 0.22, 99.21),
    ("LLaMA2-7B", "FTP, static router", 0.22, 98.30),
    ("LLaMA2-7B", "BlockPruner", 0.2099, 84.91),
    ("LLaMA2-7B", "ShortGPT", 0.27, 80.22),
    ("LLaMA2-13B", "FTP", 0.22, 98.84),
)
BY_SPARSITY = _rows(
    ("LLaMA2-7B", "FTP", 0.22, 99.21),
    ("LLaMA2-7B", "FTP", 0.30, 98.03),
    ("LLaMA2-7B", "FTP", 0.40, 92.26),
)
ROUTERS = _rows(
    ("LLaMA2-7B", "random tokens", 0.30, 68.96),
    ("LLaMA2-7B", "FTP, static router", 0.30, 97.63),
    ("LLaMA2-7B", "FTP", 0.30, 98.03),
)
ALLOCATION = _rows(
    ("LLaMA2-7B", "uniform", 0.30, 72.80),
    ("LLaMA2-7B", "GA + fine-tune", 0.30, 98.03),
)
FACTORS = _rows(
    ("LLaMA2-7B", "hidden", 0.30, 86.02),
    ("LLaMA2-7B", "hidden+factors", 0.30, 87.01),
    ("LLaMA2-7B", "without position", 0.30, 82.39),
    ("LLaMA2-7B", "without sparsity", 0.30, 92.15),
    ("LLaMA2-7B", "all four", 0.30, 98.03),
)
SPEED: list[Record] = [
    {
        "model": "LLaMA2-7B",
        "method": "FTP",
        "sparsity": 0.30,
        "speedup": 1.28,
        "length": "1000-2000",
        "source": "quoted",
    },
    {
        "model": "LLaMA2-7B",
        "method": "FTP",
        "sparsity": 0.40,
        "speedup": 1.61,
        "length": "1000-2000",
        "source": "quoted",
    },
]
"""Ends of the range that the paper gives; over its whole table it is 1.24x to 1.76x."""
