"""Choice of experts, and the order of rows that grouped matrix multiplication needs."""

from pallas_kernels.routing.api import Plan, RouterSpec, Stats, combine_rows, gather_rows, plan, route, route_and_plan

__all__ = ["Plan", "RouterSpec", "Stats", "combine_rows", "gather_rows", "plan", "route", "route_and_plan"]
