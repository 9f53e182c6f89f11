"""The lectures' models, one file each, and the tasks they share."""
