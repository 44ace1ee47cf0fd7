"""Hydra configuration groups; installed as `medspark.configs`."""
