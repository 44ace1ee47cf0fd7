"""SparK pre-training of 3D CNNs on truly sparse CT volumes."""

__version__ = "0.1.0"
