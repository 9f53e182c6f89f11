"""A sweep: what its file says, what its trials draw, and how they are run."""
