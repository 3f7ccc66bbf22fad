"""Stage two: students learn from a cache; and the training of a teacher before stage one."""
