"""Measures what a machine really does and makes a profile of it (`hardware_db.profile`)."""

from autopar.calibrate.measure import calibrate

__all__ = ["calibrate"]
