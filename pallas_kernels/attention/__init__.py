"""Bidirectional attention with structure given by small integer arrays."""

from pallas_kernels.attention.api import AttentionSpec, attention

__all__ = ["AttentionSpec", "attention"]
