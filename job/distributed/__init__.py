"""Several processes as one run: ranks, process group, rendezvous, launcher."""
