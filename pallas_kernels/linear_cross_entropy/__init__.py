"""Vocabulary projection and cross-entropy in one operation."""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, loss_and_entropy, loss_and_logsumexp, merge

__all__ = ["linear_cross_entropy", "loss_and_entropy", "loss_and_logsumexp", "merge"]
