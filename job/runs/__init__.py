"""One run in the object store: its folder, its attempts, the lease that makes one of them the only writer."""
