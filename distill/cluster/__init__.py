"""Groups of training workers: what a training loop sees of them, and Ray, which runs them."""
