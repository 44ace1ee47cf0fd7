"""Pre-training: one Lightning module per method, and what a checkpoint says."""
