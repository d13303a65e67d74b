"""`verify`: whether a published run is what its manifest says. `verify` lists the checks, one file for each group."""
