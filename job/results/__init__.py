"""The results manifest: how it is built, read, priced and compared."""
