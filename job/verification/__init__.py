"""Whether a published run is what its manifest says."""
