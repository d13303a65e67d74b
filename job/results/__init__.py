"""The results manifest: built (`manifest`), priced (`cost`), read back (`reader`), compared (`compare`, `baseline`)."""
