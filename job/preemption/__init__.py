"""Stopping in time.

`stop_flag` holds the request to stop and decides what still fits before the kill, `spot_notices` asks the cloud
(`metadata_services` has one class for each), and `watchdog` ends a run that makes no progress.
"""
