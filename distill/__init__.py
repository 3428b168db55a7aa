"""The shared vocabulary of the project: images, crops, soft labels, networks, checkpoints. It imports none of the other packages."""

__version__ = "0.1.0"
