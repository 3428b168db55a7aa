"""Networks out of torch: the served teacher graph, the Triton model repository, the students' edge files, and the gates they pass."""
