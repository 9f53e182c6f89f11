"""Many runs side by side: read from their folders, put into tables, sentences and one HTML page."""
