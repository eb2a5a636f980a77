"""Vocabulary projection, choice of a token, and how sure it is, in one operation."""

from pallas_kernels.linear_confidence.api import Confidence, Partial, counter_bits, finish, linear_confidence, linear_confidence_partial, merge

__all__ = ["Confidence", "Partial", "counter_bits", "finish", "linear_confidence", "linear_confidence_partial", "merge"]
