"""Find and remove backdoors in diffusion models."""

__version__ = "0.1.0"
