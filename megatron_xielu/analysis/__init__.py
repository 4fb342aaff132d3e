"""Planning a run and reading what it wrote."""
