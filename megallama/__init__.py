"""megallama: pre-training LLaMA models in 3D parallel."""

__version__ = "0.2.0"
