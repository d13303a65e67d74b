"""Pushes a complete run to where models are served from: a hub, a registry. `push` lists the targets."""
