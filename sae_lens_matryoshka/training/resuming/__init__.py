"""Runs that survive being killed: complete checkpoints, the one to go on from, and a store that goes on exactly."""
