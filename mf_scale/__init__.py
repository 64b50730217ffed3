"""mf_scale: large-scale distributed pretraining of MaskFormer."""

__version__ = "0.1.0"
