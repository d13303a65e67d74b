"""Helpers that know nothing of the job: hashing, threads, formatting, tables, what the machine is and has."""
