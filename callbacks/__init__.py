"""What all runs share: seeding, checkpoints, progress, pictures, receipt."""
