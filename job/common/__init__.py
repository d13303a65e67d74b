"""Helpers independent of the rest of the job: hashing, threads, formatting, tables, what the machine is and has."""
