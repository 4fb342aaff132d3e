"""Whether this machine computes what it should, feature by feature."""
