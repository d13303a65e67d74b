"""What a GPU's driver and libraries take of its memory, wherever memory is forecast or divided."""

CONTEXT_BYTES = 600 << 20
"""Of the driver and the libraries' workspaces. Assumed."""
