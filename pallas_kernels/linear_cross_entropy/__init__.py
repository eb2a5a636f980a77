"""Vocabulary projection and cross-entropy in one operation."""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
