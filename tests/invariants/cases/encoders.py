"""Encoders."""

from tests.invariants.case import Case

CASES: list[Case] = []
