"""Cameras, depth, the depth watertight mesh, its renderers, trajectories and masks."""
