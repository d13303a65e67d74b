"""Helpers that know nothing of the job: hashing, threads, resources, formatting."""
