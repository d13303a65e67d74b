"""The results manifest: building (`manifest`), cost (`cost`), reading (`reader`), comparing (`compare`, `baseline`)."""
