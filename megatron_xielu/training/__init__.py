"""A pretraining run as its user sees it: the entry point, the step line and the metrics file."""
