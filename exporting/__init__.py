"""What `export.py` is made of: what a model's graph is, and how each format is written and run."""
