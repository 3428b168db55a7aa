"""The third stage: students trained on the teacher's soft labels, which go through a store so that no crop is asked for twice."""
