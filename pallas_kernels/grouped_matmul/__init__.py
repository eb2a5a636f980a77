"""Matrix multiplication of rows that are sorted by expert."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
