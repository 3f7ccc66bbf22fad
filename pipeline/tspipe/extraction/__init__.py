"""Stage one: the teacher runs once over a dataset and writes a feature cache."""
