"""What `train.py` is made of: the command line, the run's folder, the loggers, one line for every mistake."""
