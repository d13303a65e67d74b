"""Stopping in time: signals, spot notices, and the watchdog for a run that stalls."""
