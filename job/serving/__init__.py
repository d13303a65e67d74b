"""Asks a server of the published model the run's own questions. `servers` lists the servers and says how to add one."""
